"""Requests: retries that respect the server, limits, several servers, keys that stay secret, one clear line."""

import threading
import time

import pytest
from stub_server import CLOSE, HANG, completion, echo, stub_server

from dpo_fast.config import ServerConfig
from dpo_fast.curate.engines.chat import read_replies
from dpo_fast.curate.engines.servers import EngineError, NotFound, Refused, Servers
from dpo_fast.errors import UserError

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def ask(urls, **settings):
    config = ServerConfig(**{"max_retries": 2} | settings)
    return Servers(urls, config).post("/chat/completions", BODY, read_replies).choices[0].text


def first(*answers):
    """The first answers of a server, then those of `echo`."""
    return lambda body, number: answers[number] if number < len(answers) else echo(body, number)


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "slow down"}}, {}),
        (500, b"boom", {}),
        (503, b"", {}),
        (200, b"<html>", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": {"content": 3}}]}, {}),
        (200, [], {}),
        CLOSE,
    ],
    ids=["429", "500", "503", "no JSON", "no choices", "no text", "a list", "closed"],
)
def test_a_failure_is_repeated_until_the_command_stops_in_one_line(failure):
    with stub_server(first(failure, failure)) as stub:
        assert ask(stub.url) == "hello"
        assert len(stub.requests) == 3
    with stub_server(lambda body, number: failure) as stub:
        with pytest.raises(EngineError, match="failed 3 times in a row") as caught:
            ask(stub.url)
        assert len(stub.requests) == 3
    assert stub.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_hangs_is_asked_again():
    with stub_server(first(HANG)) as stub:
        assert ask(stub.url, request_timeout=0.2) == "hello"
    with (
        stub_server(lambda body, number: HANG) as stub,
        pytest.raises(EngineError, match=r"no answer within 0.2 s \(--request_timeout\)"),
    ):
        ask(stub.url, request_timeout=0.2, max_retries=1)


def test_no_server_at_all():
    with stub_server() as stub:
        gone = stub.url
    with pytest.raises(EngineError, match=f"{gone}: cannot be reached: Connection refused"):
        ask(gone)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retry_after_pauses_all_requests_to_the_server(status):
    with stub_server(first((status, b"", {"Retry-After": "1"}))) as stub:
        servers = Servers(stub.url, ServerConfig())
        servers.post("/chat/completions", BODY, read_replies)
        assert stub.times[1] - stub.times[0] >= 1
    with stub_server(first((status, b"", {"Retry-After": "1"}))) as stub:
        servers = Servers(stub.url, ServerConfig())
        one = threading.Thread(target=servers.post, args=("/chat/completions", BODY, read_replies))
        one.start()
        while not servers._servers[0].failures:
            time.sleep(0.001)
        servers.post("/chat/completions", BODY, read_replies)
        one.join()
        assert min(stub.times[1:]) - stub.times[0] >= 1


def test_a_busy_server_may_turn_a_request_down_often_while_it_answers_others():
    """Its failures count only if nothing succeeds in between."""

    def answer(body, number):
        unlucky = body["messages"][0]["content"] == "unlucky"
        return (429, b"", {}) if unlucky and number < 16 else completion("at last" if unlucky else "")

    with stub_server(answer) as stub:
        servers = Servers(stub.url, ServerConfig(max_retries=2))
        found = []
        body = {"messages": [{"role": "user", "content": "unlucky"}]}
        one = threading.Thread(target=lambda: found.append(servers.post("/chat/completions", body, read_replies)))
        one.start()
        while one.is_alive():
            servers.post("/chat/completions", BODY, read_replies)
        one.join()
    assert found[0].choices[0].text == "at last"


def test_requests_per_minute():
    with stub_server(first((500, b"", {}))) as stub:
        servers = Servers(stub.url, ServerConfig(max_requests_per_minute=600))
        for _ in range(5):
            servers.post("/chat/completions", BODY, read_replies)
        assert len(stub.times) == servers.num_requests == 6
        # The retry counts, too: five steps of 0.1 s, less what the first request took to arrive.
        assert stub.times[-1] - stub.times[0] > 0.4


def test_servers_share_the_work_and_a_dead_one_is_left_out():
    with stub_server() as gone:
        pass
    with stub_server(delay=0.02) as one, stub_server(delay=0.02) as other:
        servers = Servers([one.url, gone.url, other.url], ServerConfig())
        threads = [
            threading.Thread(target=servers.post, args=("/chat/completions", BODY, read_replies)) for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(one.requests) + len(other.requests) == 40
        assert min(len(one.requests), len(other.requests)) >= 10


def test_a_request_that_failed_prefers_another_server():
    with stub_server(lambda body, number: (500, b"", {})) as bad, stub_server() as good:
        servers = Servers([bad.url, good.url], ServerConfig(max_retries=1))
        for _ in range(5):
            servers.post("/chat/completions", BODY, read_replies)
        assert len(good.requests) == 5


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, Refused, "HTTP 400: too long"),
        (422, Refused, "HTTP 422: too long"),
        (401, UserError, "check the API key in the environment variable MY_KEY"),
        (404, NotFound, "check the base URL"),
        (302, UserError, "check the base URL"),
    ],
)
def test_what_would_fail_again_is_not_repeated(status, kind, message):
    with stub_server(lambda body, number: (status, {"error": {"message": "too long"}}, {})) as stub:
        with pytest.raises(kind, match=message):
            ask(stub.url, api_key_env="MY_KEY")
        assert len(stub.requests) == 1


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with stub_server() as stub:
        ask(stub.url, api_key_env="MY_KEY")
        assert stub.requests[0][2]["authorization"] == "Bearer sk-secret"
    for status in (400, 401, 429, 500):
        answer = (status, {"error": "the key sk-secret is no good"}, {})
        with stub_server(lambda body, number, answer=answer: answer) as stub:
            with pytest.raises((Refused, UserError, EngineError)) as caught:
                ask(stub.url, api_key_env="MY_KEY")
            assert "sk-secret" not in str(caught.value)
            assert "the key *** is no good" in str(caught.value)
    assert "sk-secret" not in caplog.text
    assert "***" in caplog.text


def test_request_options_are_on_top_and_a_null_removes_a_field():
    with stub_server() as stub:
        ask(stub.url, request_options={"model": "other", "top_k": 20, "messages_": None})
        assert stub.requests[0][1] == BODY | {"model": "other", "top_k": 20}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": ""}, "no server given: pass --base_url"),
        ({"base_url": []}, "no server given: pass --base_url"),
        ({"base_url": "localhost:8000"}, "expected an address such as http"),
        ({"base_url": "http://host:port/v1"}, "expected an address such as http"),
        ({"base_url": "http://me:secret@host/v1"}, "expected an address without a user name"),
        ({"concurrency": 0}, "--concurrency 0: expected a number above 0"),
        ({"max_retries": -1}, "--max_retries -1"),
        ({"request_timeout": 0}, "--request_timeout 0"),
        ({"max_requests_per_minute": 0}, "--max_requests_per_minute 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    def servers(base_url, **settings):
        return Servers(base_url, ServerConfig(**settings))

    with pytest.raises(UserError, match=message) as caught:
        servers(**{"base_url": "http://localhost:1/v1"} | settings)
    assert "secret" not in str(caught.value)


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with stub_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        assert ask("http://engine.invalid/v1") == "hello"
        assert proxy.requests[0][0] == "http://engine.invalid/v1/chat/completions"


def test_one_line_if_urllib3_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "urllib3", None)
    with pytest.raises(UserError, match=r"urllib3 is not installed: pip install 'dpo-fast\[engines\]'"):
        Servers("http://localhost:1/v1", ServerConfig())
