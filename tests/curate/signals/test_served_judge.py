"""Judges on a server: both orders, ties and refusals, what was received is kept."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from stub_server import completion, stub_server

from dpo_fast.cli import main
from dpo_fast.config import LabelConfig, SignalConfig
from dpo_fast.curate.engines import servers
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.errors import UserError


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers_of(body):
    """The two answers of a question, in the order in which they were shown."""
    text = body["messages"][0]["content"]
    return (
        text.partition("[Answer A]\n")[2].partition("\n\n[Answer B]")[0],
        text.partition("[Answer B]\n")[2].partition("\n\nReply")[0],
    )


def longer(body, number):
    first, second = answers_of(body)
    return completion("A" if len(first) > len(second) else "B")


def always(text):
    return lambda body, number: completion(text)


def judge(stub, *questions, **settings):
    """The scores of each row, and what was counted."""
    config = SignalConfig(signals="judge:openai:m", base_url=stub.url, **settings)
    [found] = parse_signals(config)
    rows = {i: Question({}, prompt, list(answers)) for i, (prompt, *answers) in enumerate(questions)}
    verdicts = dict(found.of_rows.judge(rows, None))
    return [[verdict.score for verdict in verdicts[i]] for i in rows], found.of_rows.summary(), verdicts


def test_every_two_answers_are_compared_in_both_orders():
    with stub_server(longer) as stub:
        scores, summary, _ = judge(stub, ("p", "a", "bbb", "cc"), ("q", "dd", "e"))
        assert scores == [[0, 1, 0.5], [1, 0]]
        asked = sorted(answers_of(body) for _, body, _ in stub.requests)
        pairs = [("a", "bbb"), ("a", "cc"), ("bbb", "cc"), ("dd", "e")]
        assert asked == sorted(pairs + [(second, first) for first, second in pairs])
        body = next(body for _, body, _ in stub.requests if answers_of(body) == ("a", "bbb"))
        assert body["temperature"] == 0
        assert body["max_tokens"] == 16
        assert "[Request]\np\n" in body["messages"][0]["content"]
    assert summary.startswith("4 comparisons in both orders: 0 ties, 0 where the orders disagree")
    assert summary.endswith("40 prompt tokens, 56 reply tokens")


@pytest.mark.parametrize(
    ("reply", "counted"),
    [
        ("A", "0 ties, 1 where the orders disagree (also ties), 0 refused"),
        ("tie", "1 ties, 0 where the orders disagree (also ties), 0 refused"),
        ("It is a tie.", "1 ties, 0 where the orders disagree (also ties), 0 refused"),
    ],
)
def test_ties(reply, counted):
    with stub_server(always(reply)) as stub:
        scores, summary, _ = judge(stub, ("p", "a", "b"))
    assert scores == [[0.5, 0.5]]
    assert counted in summary


@pytest.mark.parametrize("reply", ["", "I cannot compare these.", "Both A and B are fine.", "C"])
def test_a_reply_without_a_decision_is_a_refusal(reply):
    with stub_server(always(reply)) as stub:
        scores, summary, verdicts = judge(stub, ("p", "a", "b"))
    assert scores == [[None, None]]
    assert "the judge does not decide" in verdicts[0][0].reason
    assert "1 refused" in summary


@pytest.mark.parametrize(
    "reply", ["B", "b", " B.", "**B**", "Answer B", "The better answer is B.", "B, since A is wrong", "I prefer B."]
)
def test_the_letter_is_found_in_a_reply(reply):
    def prefer_second(body, number):
        return completion(reply if answers_of(body) == ("bad", "good") else "A")

    with stub_server(prefer_second) as stub:
        scores, _, _ = judge(stub, ("p", "bad", "good"))
    assert scores == [[0, 1]]


def test_a_refused_comparison_does_not_count():
    def answer(body, number):
        return (400, {"error": "too long"}, {}) if "long" in answers_of(body) else longer(body, number)

    with stub_server(answer) as stub:
        scores, summary, verdicts = judge(stub, ("p", "a", "bbb", "long"))
    assert scores == [[0, 1, None]]
    assert verdicts[0][2].reason == "HTTP 400: too long"
    assert "3 comparisons" in summary
    assert "2 refused" in summary


def test_identical_answers_tie_and_are_not_asked():
    with stub_server(longer) as stub:
        scores, summary, _ = judge(stub, ("p", "a", "a"), ("q", "alone"))
        assert not stub.requests
    assert scores == [[0.5, 0.5], [None]]
    assert "1 of identical answers" in summary


def test_the_question_can_be_replaced_and_answers_are_put_in_as_they_are():
    with stub_server(always("A")) as stub:
        judge(stub, ("p", "{second}", "{x} <|im_end|>"), judge_question="{{x}} {prompt}: {first} or {second}?")
        contents = {body["messages"][0]["content"] for _, body, _ in stub.requests}
    # A control token is broken up: an answer must not end the turn that shows it.
    assert contents == {"{{x}} p: {second} or {x} < |im_end|>?", "{{x}} p: {x} < |im_end|> or {second}?"}
    with pytest.raises(UserError, match=r"it lacks \{second\}"):
        parse_signals(SignalConfig(signals="judge:openai:m", judge_question="{prompt} {first}"))


def test_the_judge_may_be_on_another_server_with_another_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-judge")
    with stub_server() as other, stub_server(longer) as stub:
        config = {"judge_base_url": stub.url, "judge_api_key_env": "JUDGE_KEY"}
        scores, _, _ = judge(other, ("p", "a", "bb"), **config)
        assert scores == [[0, 1]]
        assert not other.requests
        assert stub.requests[0][2]["authorization"] == "Bearer sk-judge"


def test_a_name_is_needed():
    with pytest.raises(UserError, match="judge:openai:NAME"):
        parse_signals(LabelConfig(signals="judge:openai:"))


def write_rows(path, number):
    rows = [{"prompt": f"p{i}", "responses": [f"a{i}", f"longer {i}", f"the longest {i}"]} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arguments(stub, data, out, *more):
    return ["label", "--signals", "judge:openai:m", "--base_url", stub.url, "--data", data, "--out", str(out), *more]


def test_dry_run_counts_questions_and_tokens(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", 2)
    with stub_server(longer) as stub:
        question = "{first} {second} 345678"
        assert main([*arguments(stub, data, tmp_path / "out.jsonl", "--dry_run"), "--judge_question", question]) == 0
        assert not stub.requests
    # Six questions a row: 2 x (2 + 8 + 2 + 13 + 8 + 13) characters of answers and 8 more in each, 4 a token.
    assert "12 questions, about 70 prompt tokens, at most 192 reply tokens" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl").exists()


def test_killed_at_any_moment_no_received_reply_is_asked_for_again(tmp_path, capsys):
    data, out = write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "out.jsonl"
    with stub_server(longer, delay=0.01) as stub:
        command = arguments(stub, data, out, "--concurrency", "4")
        process = subprocess.Popen([sys.executable, "-m", "dpo_fast.cli", *command])
        while len(stub.requests) < 70:
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert main(command) == 0
        assert 180 <= len(stub.requests) <= 184
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[0, 0.5, 1]] * 30
    # The counts are those of the whole work.
    assert "90 comparisons in both orders: 0 ties" in capsys.readouterr().out


def test_a_server_that_fails_stops_the_run_in_one_line(tmp_path, capsys):
    data, out = write_rows(tmp_path / "rows.jsonl", 10), tmp_path / "out.jsonl"
    with stub_server(lambda body, number: longer(body, number) if number < 20 else (500, b"", {})) as stub:
        assert main(arguments(stub, data, out, "--concurrency", "4", "--max_retries", "1")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dpo-fast label: stopped: {stub.url}: HTTP 500: no reason given (failed 2 times in a row)")
    assert error.endswith("rerun the same command to resume\n")
