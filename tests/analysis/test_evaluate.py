"""`dpo-fast eval` against plain forwards, and its files."""

import json
from pathlib import Path

import pytest
import torch
from oracle import padded_sequence_logps, save_tiny_checkpoint
from rich.console import Console
from transformers import AutoModelForCausalLM

from dpo_fast import EvalConfig, evaluate
from dpo_fast.analysis.evaluate import judge
from dpo_fast.cli import main
from dpo_fast.config import DataConfig
from dpo_fast.data.load import load_groups
from dpo_fast.model.load import load_tokenizer

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": "The capital of France", "chosen": " is Paris.", "rejected": " is London, of England."},
    {"prompt": "Numbers", "chosen": " such as 0 1 2", "rejected": " fox"},
    {"prompt": "A preference pair holds", "chosen": " a prompt", "rejected": " a fox and a dog"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny_checkpoint(tmp_path / "reference")
    save_tiny_checkpoint(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter, generator=None))
    model.save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    return tmp_path


def test_pairs_are_scored_as_a_plain_forward_does(folder):
    figures = evaluate(
        EvalConfig(model="model", reference="reference", data="pairs.jsonl"), console=Console(quiet=True)
    )
    groups, _ = load_groups(DataConfig(data="pairs.jsonl"), load_tokenizer("model"))
    rewards = {}
    for side, answer in (("chosen", 0), ("rejected", 1)):
        sums = []
        for name in ("model", "reference"):
            plain = AutoModelForCausalLM.from_pretrained(name).double()
            with torch.no_grad():
                sums.append(padded_sequence_logps(plain, groups, answer).numpy())
        rewards[side] = 0.1 * (sums[0] - sums[1])
        assert figures["pairs"][f"reward_{side}"]["value"] == pytest.approx(rewards[side].mean(), abs=1e-4)
    margins = rewards["chosen"] - rewards["rejected"]
    assert figures["pairs"]["margin"]["value"] == pytest.approx(margins.mean(), abs=1e-4)
    assert figures["pairs"]["accuracy"]["value"] == (margins > 0).mean()


def test_the_command_writes_figures_and_answers(folder, capsys):
    command = ["eval", "--model", "model", "--reference", "reference", "--data", "pairs.jsonl"]
    command += ["--prompts", "prompts.jsonl", "--signals", "[length:1-12, contains:mark]", "--out", "eval.json"]
    command += ["--num_samples", "5", "--max_new_tokens", "6"]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "mark": "a"}) + "\n" for row in ROWS))
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "3 held-out pairs" in printed
    assert "15 answers per model to 3 prompts" in printed
    figures = json.loads(Path("eval.json").read_text())
    rows = [json.loads(line) for line in Path("eval.answers.jsonl").read_text().splitlines()]
    wins = sum(a["score"] > b["score"] for row in rows for a, b in zip(row["model"], row["reference"], strict=True))
    assert figures["answers"]["wins"] == wins
    for row in rows:
        for answer in row["model"] + row["reference"]:
            assert answer["score"] == (1 <= len(answer["text"]) <= 12) + ("a" in answer["text"])
    assert figures["answers"]["kl"]["value"] > 0


def test_answers_of_both_models_are_judged_in_one_row():
    """An answer without a number scores one less than the worst of its row, whichever model wrote that one."""
    own = [{"prompt": "p", "sum": 5, "responses": ["5", "none"], "samples": [{}, {}]}]
    ref = [{"prompt": "p", "sum": 5, "responses": ["105"], "samples": [{}]}]
    config = EvalConfig(signals="number:sum")
    (model,), (reference,) = judge(own, ref, config, Console(quiet=True))
    assert model["scores"] == [0.0, -101.0]
    assert reference["scores"] == [-100.0]
    assert model["signals"] == {"number:sum": [0.0, -101.0]}
    assert (model["responses"], reference["responses"]) == (["5", "none"], ["105"])


def test_a_model_ties_with_itself(folder):
    config = EvalConfig(
        model="reference",
        reference="reference",
        data="pairs.jsonl",
        prompts="prompts.jsonl",
        signals="length:1-12",
        num_samples=4,
        max_new_tokens=6,
    )
    figures = evaluate(config, console=Console(quiet=True))
    assert figures["pairs"]["margin"] == {"value": 0, "low": 0, "high": 0}
    assert figures["pairs"]["accuracy"]["value"] == 0.5
    assert figures["answers"]["ties"] == 12
    assert figures["answers"]["score"]["rise"] == {"value": 0, "low": 0, "high": 0}
    assert figures["answers"]["kl"]["value"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--model model --data pairs.jsonl", "no reference given: pass --reference"),
        ("--model model --reference reference", "nothing to evaluate on"),
        ("--model model --reference reference --prompts prompts.jsonl", "name a signal with --signals"),
        ("--model model --reference reference --data pairs.jsonl --signals json", "pass --prompts"),
        ("--model model --reference reference --data pairs.jsonl --out e.csv", "ends in .json"),
        ("--reference reference --data pairs.jsonl", "no model given"),
        ("--model model --reference nowhere --data pairs.jsonl", "--model nowhere: cannot load"),
        ("--model model --reference reference --prompts prompts.jsonl --signals jsonn", "jsonn"),
    ],
)
def test_mistakes_give_one_line(folder, capsys, command, message):
    assert main(["eval", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
