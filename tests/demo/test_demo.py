"""The demo's task by hand-made cases, and the whole of it once."""

import io
import json
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from dpo_fast.cli import main, make_parser, normalize
from dpo_fast.config import SampleConfig
from dpo_fast.demo.run import MARKER, OUTPUTS, command_line, prepare_folder, run_demo
from dpo_fast.demo.task import BREAKAGES, good_answer, is_right, make_prompts, parses, prompt_text
from dpo_fast.errors import UserError

FIELDS = {"name": "Ada", "age": 36, "pet": "owl"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One quick demo: (its folder, its summary, what it printed)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=100)
    return out, run_demo(out, quick=True, console=console), console.file.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_distinct_and_seeded():
    prompts = make_prompts(300, random.Random(3))
    assert len({prompt_text(fields) for fields in prompts}) == 300
    assert prompts == make_prompts(300, random.Random(3))
    assert prompts != make_prompts(300, random.Random(4))
    assert {len(fields) for fields in prompts} == {2, 3}


def test_the_good_answer_is_right_and_every_breakage_breaks():
    assert prompt_text(FIELDS) == "name=Ada age=36 pet=owl ->"
    assert is_right(good_answer(FIELDS), {"fields": FIELDS})
    for name, breakage in BREAKAGES.items():
        for seed in range(20):
            broken = breakage(good_answer(FIELDS), random.Random(seed))
            assert not parses(broken), f"{name}: {broken}"


@pytest.mark.parametrize("text", ["", " 7", ' "name"', " [1]", ' {"name": "Ada"} x', "{", "null", "\ud800"])
def test_only_objects_parse(text):
    assert not parses(text)


def test_an_object_of_other_contents_parses_but_is_not_right():
    assert parses(' {"name": "Alan", "age": 36, "pet": "owl"}')
    assert not is_right(' {"name": "Alan", "age": 36, "pet": "owl"}', {"fields": FIELDS})


def test_a_stage_is_shown_as_a_command_that_does_the_same():
    config = SampleConfig(model="a b", data="d.jsonl", out="o.jsonl", temperature=[0.5, 1.0], num_samples=4)
    import shlex

    words = shlex.split(command_line("sample", config))
    assert words[:2] == ["dpo-fast", "sample"]
    parsed = make_parser().parse_args(normalize(words[1:]))["sample"].as_dict()
    parsed.pop("config", None)
    assert SampleConfig(**parsed) == config


def test_the_demo_raises_what_is_wanted(demo):
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


def test_the_summary_can_be_had_again_from_the_folder(demo):
    """Counts the recorded answers, and writes the likeliest ones again with the saved models."""
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


def test_a_second_demo_replaces_the_first_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    prepare_folder(out)
    (out / "run").mkdir()
    (out / "run" / "x").touch()
    (out / "summary.json").touch()
    prepare_folder(out)
    assert [path.name for path in out.iterdir()] == [MARKER]
    (out / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex.*no demo wrote"):
        prepare_folder(out)
    assert (out / "thesis.tex").exists()


def test_a_folder_of_someone_else_is_refused_on_the_command_line(tmp_path, capsys):
    (tmp_path / "summary.json").touch()
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "choose a new or an empty folder" in capsys.readouterr().err
    assert (tmp_path / "summary.json").exists()
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
