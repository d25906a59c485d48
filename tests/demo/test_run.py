"""One whole demo."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from dpo_fast.demo.folder import MARKER, OUTPUTS
from dpo_fast.demo.run import run_demo
from dpo_fast.demo.task import is_right, parses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One quick demo: its folder, its summary, what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=100)
    return out, run_demo(out, quick=True, console=console), console.file.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_demo_improves_what_it_trains(demo):
    out, summary, printed = demo
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["rise"]["low"] > 0, "the interval of the rise does not exclude zero"
    assert summary["after"]["sampled_parse"]["low"] > summary["before"]["sampled_parse"]["high"]
    assert summary["after"]["greedy_parse"]["value"] > summary["before"]["greedy_parse"]["value"]
    assert summary["win_rate"]["low"] > 0.5
    for words in ("1. base model", "2. sample", "7. report", "What changed", "dpo-fast pair --data"):
        assert words in printed
    assert {path.name for path in out.iterdir()} <= {MARKER, *OUTPUTS}
    assert (out / "run" / "report.html").exists()


def test_the_summary_can_be_recomputed_from_the_folder(demo):
    """Counts the recorded answers, and regenerates the greedy ones with the saved models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, summary, _ = demo
    sampled, greedy = lines(out / "eval.answers.jsonl"), lines(out / "eval_greedy.answers.jsonl")
    for when, side, folder in (("before", "reference", "base"), ("after", "model", "run/final")):
        for name, rows in (("sampled_parse", sampled), ("greedy_parse", greedy)):
            share = np.mean([parses(answer["text"]) for row in rows for answer in row[side]])
            assert share == pytest.approx(summary[when][name]["value"])
        right = np.mean([is_right(answer["text"], row) for row in sampled for answer in row[side]])
        assert right == pytest.approx(summary[when]["sampled_right"]["value"])
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(out / folder),
            AutoTokenizer.from_pretrained(out / folder),
        )
        for row in greedy[:10]:
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            written = []
            with torch.no_grad():
                while len(written) < 40 and tokenizer.eos_token_id not in written:
                    written.append(model(ids).logits[0, -1].argmax().item())
                    ids = torch.cat([ids, torch.tensor([written[-1:]])], 1)
            assert tokenizer.decode(written, skip_special_tokens=True) == row[side][0]["text"]


def test_held_out_prompts_are_in_no_pair(demo):
    out, _, _ = demo
    held_out = {row["prompt"] for row in lines(out / "held_out_prompts.jsonl")}
    sides = [{row["prompt"] for row in lines(out / name)} for name in ("pairs.jsonl", "held_out_pairs.jsonl")]
    assert held_out
    assert all(sides)
    assert not held_out & (sides[0] | sides[1])
    assert not sides[0] & sides[1]
