"""`dpo-fast eval` on servers: both models answer there, a judge or a signal compares them."""

import json

from stub_server import completion, echo, stub_server

from dpo_fast.cli import main


def write_prompts(path, number):
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(number)))
    return str(path)


def writer(text):
    return lambda body, number: completion(*[text] * body.get("n", 1))


def longer(body, number):
    """A judge that prefers the longer answer."""
    text = body["messages"][0]["content"]
    first = text.partition("[Answer A]\n")[2].partition("\n\n[Answer B]")[0]
    second = text.partition("[Answer B]\n")[2].partition("\n\nReply")[0]
    return completion("A" if len(first) > len(second) else "B")


def arguments(tmp_path, number, model, reference, **settings):
    settings = {
        "model": "new",
        "reference": "old",
        "backend": "openai",
        "base_url": model.url,
        "reference_base_url": reference.url,
        "prompts": write_prompts(tmp_path / "prompts.jsonl", number),
        "out": str(tmp_path / "eval.json"),
        "num_samples": 1,
    } | settings
    return ["eval", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def test_a_judge_gives_the_win_rate_with_an_interval(tmp_path):
    def answer(body, number):
        # Wins 6 of 8 prompts against an answer of 6 letters, loses the others.
        text = body["messages"][0]["content"]
        return completion("short" if text in ("prompt 2", "prompt 5") else "longest")

    with stub_server(answer) as model, stub_server(writer("middle")) as reference, stub_server(longer) as judge:
        command = arguments(tmp_path, 8, model, reference, signals="judge:openai:j", judge_base_url=judge.url)
        assert main(command) == 0
        assert {body["model"] for _, body, _ in model.requests} == {"new"}
        assert {body["model"] for _, body, _ in reference.requests} == {"old"}
        assert len(judge.requests) == 16
    figures = json.loads((tmp_path / "eval.json").read_text())["answers"]
    assert figures["win_rate"]["value"] == 0.75
    assert figures["win_rate"]["low"] < 0.75 < figures["win_rate"]["high"]
    assert (figures["wins"], figures["losses"]) == (6, 2)
    assert "kl" not in figures


def test_a_signal_judges_answers_of_servers(tmp_path):
    with stub_server(writer('{"a": 1}')) as model, stub_server(writer("{")) as reference:
        assert main(arguments(tmp_path, 3, model, reference, signals="json", num_samples=2)) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())["answers"]
    assert figures["win_rate"]["value"] == 1
    assert figures["answers"] == 6


def test_prompts_that_a_server_refuses_are_left_out_for_both(tmp_path, capsys):
    def answer(body, number):
        refuses = body["messages"][0]["content"] == "prompt 1"
        return (400, {"error": "too long"}, {}) if refuses else echo(body, number)

    with stub_server(answer) as model, stub_server() as reference:
        assert main(arguments(tmp_path, 4, model, reference, signals="length:1-30")) == 0
    assert "1 prompts are left out: a server refused some of their answers" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == ["prompt 0", "prompt 2", "prompt 3"]
