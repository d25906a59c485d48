"""Reward models on a server: one number for each answer, by the route that the server has."""

import pytest
from stub_server import stub_server

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.errors import UserError


def judge(stub, questions, **settings):
    config = SignalConfig(signals="reward-model:openai:m", base_url=stub.url, **settings)
    [found] = parse_signals(config)
    rows = {i: Question({}, prompt, list(answers)) for i, (prompt, *answers) in enumerate(questions)}
    verdicts = dict(found.of_rows.judge(rows, None))
    return [verdicts[i] for i in rows], found.of_rows


def length(body):
    return len(body["messages"][-1]["content"])


def pooling(body, number):
    return {"data": [{"index": 0, "object": "pooling", "data": [float(length(body))]}]}


def test_the_pooling_route_scores_the_conversation():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with stub_server(pooling) as stub:
        verdicts, signal = judge(stub, [("p", "a", "bbb"), (turns, "cc")])
        assert [[verdict.score for verdict in row] for row in verdicts] == [[1, 3], [2]]
        assert {path for path, _, _ in stub.requests} == {"/pooling"}
        bodies = {body["messages"][-1]["content"]: body for _, body, _ in stub.requests}
        assert bodies["bbb"] == {
            "model": "m",
            "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bbb"}],
        }
        assert bodies["cc"]["messages"] == [*turns, {"role": "assistant", "content": "cc"}]
    assert signal.summary() == "3 answers scored by the server, 0 refused"
    # (1 + 1) + (1 + 3) characters.
    assert signal.estimate([Question({}, "p", ["a", "bbb"])]) == "2 requests, about 2 tokens"


def test_the_classify_route_if_there_is_no_pooling():
    with stub_server() as stub:

        def answer(body, number):
            if stub.requests[number][0] == "/pooling":
                return 404, {"detail": "Not Found"}, {}
            return {"data": [{"index": 0, "label": "LABEL_0", "probs": [length(body) / 10], "num_classes": 1}]}

        stub.answer = answer
        verdicts, _ = judge(stub, [("p", "a", "bbb", "cc")], concurrency=1)
        assert [verdict.score for verdict in verdicts[0]] == [0.1, 0.3, 0.2]
        assert len(stub.requests) == 4


def test_a_refused_answer_has_no_score():
    def answer(body, number):
        return (400, {"error": {"message": "too long"}}, {}) if length(body) > 2 else pooling(body, number)

    with stub_server(answer) as stub:
        verdicts, signal = judge(stub, [("p", "a", "bbb")])
    assert verdicts == [[(1, None), (None, "HTTP 400: too long")]]
    assert signal.summary() == "1 answers scored by the server, 1 refused"


def test_a_model_with_several_outputs_is_no_reward_model():
    with (
        stub_server(lambda body, number: {"data": [{"data": [0.1, 0.2]}]}) as stub,
        pytest.raises(UserError, match="2 outputs"),
    ):
        judge(stub, [("p", "a")])


def test_no_route_at_all():
    with (
        stub_server(lambda body, number: (404, b"", {})) as stub,
        pytest.raises(UserError, match="check the base URL"),
    ):
        judge(stub, [("p", "a")])
