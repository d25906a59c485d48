"""Answers of served models: what is asked, what is kept, nothing that was received is asked again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from stub_server import completion, echo, stub_server

from dpo_fast.cli import main

PROMPTS = [f"prompt {i}" for i in range(6)]


def write_prompts(path, number):
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(number)))
    return str(path)


def arguments(stub, data, out, **settings):
    settings = {"model": "m", "backend": "openai", "base_url": stub.url, "data": data, "out": str(out)} | settings
    return ["sample", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def test_one_request_brings_all_answers_to_a_prompt(served):
    with stub_server() as stub:
        rows = served(stub.url, PROMPTS, num_samples=3, temperature=0.7, top_p=0.9, max_new_tokens=11)
        assert [row["responses"] for row in rows] == [[p, f"{p} 1", f"{p} 2"] for p in PROMPTS]
        assert len(stub.requests) == 6
        path, body, _ = stub.requests[0]
        assert path == "/v1/chat/completions"
        seed = body.pop("seed")
        assert 0 <= seed < 2**31
        assert body == {
            "model": "m",
            "messages": rows[int(body["messages"][0]["content"][-1])]["prompt"],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 11,
            "n": 3,
        }
        assert rows[0]["prompt"] == [{"role": "user", "content": "prompt 0"}]
        assert rows[0]["samples"][2] == {
            "model": "m",
            "temperature": 0.7,
            "logp": None,
            "seed": rows[0]["samples"][0]["seed"],
            "finished": True,
            "finish_reason": "stop",
            "num_tokens": None,
        }


def test_a_cut_answer_is_marked_and_counted(served):
    with stub_server(lambda body, number: completion("cut", finish_reason="length", tokens=9)) as stub:
        (row,) = served(stub.url, ["p"])
    assert row["samples"][0]["finished"] is False
    assert row["samples"][0]["finish_reason"] == "length"
    assert row["samples"][0]["num_tokens"] == 9


def test_seeds_differ_between_prompts_and_are_the_same_in_the_next_run(served):
    bodies = []
    for seed in (1, 1, 2):
        with stub_server() as stub:
            served(stub.url, PROMPTS, seed=seed)
            bodies.append({body["messages"][0]["content"]: body["seed"] for _, body, _ in stub.requests})
    assert bodies[0] == bodies[1]
    assert not set(bodies[0].values()) & set(bodies[2].values())
    assert len(set(bodies[0].values())) == 6


@pytest.mark.parametrize("ignores", [True, False], ids=["ignored", "rejected"])
def test_a_server_without_n_takes_one_request_per_answer(served, ignores):
    def answer(body, number):
        if body.get("n", 1) > 1 and not ignores:
            return 400, {"error": "n must be 1"}, {}
        return completion(f"answer {body['seed']}")

    with stub_server(answer) as stub:
        rows = served(stub.url, PROMPTS, num_samples=3, concurrency=1)
        # A rejected request costs one more, and only for the first prompt.
        assert len(stub.requests) == 18 + (not ignores)
    assert all(len(set(row["responses"])) == 3 for row in rows)
    assert all(how["num_tokens"] == 7 for row in rows for how in row["samples"])


def test_models_and_temperatures_share_the_answers(served):
    with stub_server() as stub:
        (row,) = served(stub.url, ["p"], model=["m", "other"], temperature=[0.5, 1.5], num_samples=6)
        assert sorted(body.get("n", 1) for _, body, _ in stub.requests) == [1, 1, 2, 2]
    sources = [(how["model"], how["temperature"]) for how in row["samples"]]
    assert [sources.count(source) for source in dict.fromkeys(sources)] == [2, 2, 1, 1]


def test_plain_text_goes_to_completions_and_messages_with_tools_to_chat(served, tmp_path):
    with stub_server(lambda body, number: {"choices": [{"text": "on", "finish_reason": "stop"}]}) as stub:
        (row,) = served(stub.url, ["go"], apply_chat_template=False)
        path, body, _ = stub.requests[0]
        assert (path, body["prompt"], row["prompt"]) == ("/v1/completions", "go", "go")
        assert row["responses"] == ["on"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "p", "tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "mark": 1})
    )
    with stub_server() as stub:
        assert main(arguments(stub, str(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl", num_samples=1)) == 0
        _, body, _ = stub.requests[0]
        assert body["tools"] == tools
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert json.loads((tmp_path / "out.jsonl").read_text())["mark"] == 1


def test_a_refused_prompt_is_dropped_and_counted(tmp_path, capsys):
    def answer(body, number):
        refuses = body["messages"][0]["content"] == "prompt 2"
        return (400, {"error": {"message": "too long"}}, {}) if refuses else echo(body, number)

    with stub_server(answer) as stub:
        data = write_prompts(tmp_path / "prompts.jsonl", 5)
        assert main(arguments(stub, data, tmp_path / "out.jsonl", num_samples=2)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["responses"][0] for row in rows] == [f"prompt {i}" for i in (0, 1, 3, 4)]
    assert "2 answers refused (HTTP 400: too long)" in capsys.readouterr().out


def test_a_server_that_refuses_everything_stops_the_run(tmp_path, capsys):
    with stub_server(lambda body, number: (400, {"error": "no"}, {})) as stub:
        data = write_prompts(tmp_path / "prompts.jsonl", 500)
        assert main(arguments(stub, data, tmp_path / "out.jsonl", num_samples=1, concurrency=4)) == 2
        assert len(stub.requests) < 20
    assert "the server refuses every request: HTTP 400: no" in capsys.readouterr().err


def test_dry_run_sends_nothing(tmp_path, capsys):
    with stub_server() as stub:
        data = write_prompts(tmp_path / "prompts.jsonl", 10)
        command = arguments(stub, data, tmp_path / "out.jsonl", num_samples=3, max_new_tokens=10)
        assert main([*command, "--dry_run"]) == 0
        assert not stub.requests
    assert not list(tmp_path.glob("out*"))
    # "prompt 0" has 8 characters.
    assert "10 requests for 30 answers, about 20 prompt tokens, at most 300 answer tokens" in capsys.readouterr().out


def test_a_thousand_prompts_32_at_once(served):
    with stub_server() as stub:
        stub.hold_until = 32
        rows = served(stub.url, [f"p{i}" for i in range(1000)], concurrency=32)
        assert [row["responses"] for row in rows] == [[f"p{i}"] for i in range(1000)]
        assert len(stub.requests) == 1000
        assert stub.most_at_once == 32


def test_killed_at_any_moment_no_received_answer_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    number, concurrency = 400, 8
    data, out = write_prompts(tmp_path / "prompts.jsonl", number), tmp_path / "out.jsonl"
    with stub_server(delay=0.01) as stub:
        command = arguments(stub, data, out, num_samples=2, concurrency=concurrency)
        for stop_at in (60, 200):
            process = subprocess.Popen([sys.executable, "-m", "dpo_fast.cli", *command])
            while len(stub.requests) < stop_at:
                assert process.poll() is None
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        received = len((tmp_path / "out.jsonl.partial").read_text().splitlines())
        assert received > 100
        assert "sk-secret" not in (tmp_path / "out.jsonl.partial").read_text()
        # What does not change an answer may change before the run resumes.
        assert main([*command, "--max_retries", "3"]) == 0
        assert number <= len(stub.requests) <= number + 2 * concurrency
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["responses"] for row in rows] == [[f"prompt {i}", f"prompt {i} 1"] for i in range(number)]
    assert "sk-secret" not in out.read_text()


def test_the_server_is_killed_in_the_middle_and_comes_back(served):
    with stub_server(delay=0.005) as first:
        port = int(first.url.split(":")[2].removesuffix("/v1"))
        rows = []
        prompts = [f"p{i}" for i in range(200)]
        thread = threading.Thread(target=lambda: rows.extend(served(first.url, prompts, concurrency=4)))
        thread.start()
        while len(first.requests) < 60:
            time.sleep(0.001)
    with stub_server(port=port) as second:
        thread.join()
    assert [row["responses"] for row in rows] == [[p] for p in prompts]
    assert len(first.requests) + len(second.requests) <= 200 + 4


def test_a_server_that_stays_away_stops_the_run_in_one_line_and_what_it_answered_is_kept(tmp_path, capsys):
    def answer(body, number):
        return (500, b"out of memory", {}) if 20 <= number < 40 else echo(body, number)

    data, out = write_prompts(tmp_path / "prompts.jsonl", 100), tmp_path / "out.jsonl"
    with stub_server(answer) as stub:
        command = arguments(stub, data, out, num_samples=1, concurrency=4, max_retries=1)
        assert main(command) == 1
        line = f"dpo-fast sample: stopped: {stub.url}: HTTP 500: out of memory (failed 2 times in a row); "
        error = capsys.readouterr().err
        assert error.startswith(line)
        assert error.endswith(f"results are kept in {out}.partial: rerun the same command to resume\n")
        assert error.count("\n") == 1
        stub.answer = echo
        before = len(stub.requests)
        assert main(command) == 0
        assert len(stub.requests) - before <= 80 + 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": "t.jinja"}, "--chat_template: a server applies its own template"),
        ({"backend": "transformers", "dry_run": "true"}, "--dry_run: estimates requests to a server"),
        ({"base_url": "nowhere"}, "--base_url nowhere: expected an address"),
        ({"num_samples": 0}, "--num_samples 0"),
    ],
)
def test_settings_that_cannot_work(settings, message, tmp_path, capsys):
    with stub_server() as stub:
        data = write_prompts(tmp_path / "prompts.jsonl", 1)
        assert main(arguments(stub, data, tmp_path / "out.jsonl", **settings)) == 2
    assert message in capsys.readouterr().err
