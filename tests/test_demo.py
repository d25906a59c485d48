"""The demo's task by hand-made cases, its measurements against independent formulas, and the whole of it once."""

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from dpo_fast.cli import main
from dpo_fast.config import UserError
from dpo_fast.demo import MARKER, pair_answers, prepare_folder, run_demo
from dpo_fast.demo_measure import mean_logps
from dpo_fast.demo_task import (
    BREAKAGES,
    Answer,
    answer_logps,
    generate,
    good_answer,
    is_right,
    make_prompts,
    parses,
    prompt_text,
)
from dpo_fast.intervals import bootstrap_interval, wilson_interval

FIELDS = {"name": "Ada", "age": 36, "pet": "owl"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One quick demo: (its folder, its summary, what it printed)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=100)
    return out, run_demo(out, quick=True, console=console), console.file.getvalue()


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_prompts_are_distinct_and_seeded():
    prompts = make_prompts(300, random.Random(3))
    assert len({prompt_text(fields) for fields in prompts}) == 300
    assert prompts == make_prompts(300, random.Random(3))
    assert prompts != make_prompts(300, random.Random(4))
    assert {len(fields) for fields in prompts} == {2, 3}


def test_the_good_answer_is_right_and_every_breakage_breaks():
    assert prompt_text(FIELDS) == "name=Ada age=36 pet=owl ->"
    assert is_right(good_answer(FIELDS), FIELDS)
    for name, breakage in BREAKAGES.items():
        for seed in range(20):
            broken = breakage(good_answer(FIELDS), random.Random(seed))
            assert not parses(broken), f"{name}: {broken}"


@pytest.mark.parametrize("text", ["", " 7", ' "name"', " [1]", ' {"name": "Ada"} x', "{", "null", "\ud800"])
def test_only_objects_parse(text):
    assert not parses(text)


def test_an_object_of_other_contents_parses_but_is_not_right():
    assert parses(' {"name": "Alan", "age": 36, "pet": "owl"}')
    assert not is_right(' {"name": "Alan", "age": 36, "pet": "owl"}', FIELDS)


def test_pairs_take_the_first_of_each_kind_and_count_the_rest():
    good, bad = Answer(' {"a": 1}', [1]), Answer(" {", [2])
    later = Answer(' {"b": 1}', [3])
    rows, alike = pair_answers(["p", "q", "r"], [[bad, good, later], [good, later], [bad]])
    assert rows == [{"prompt": "p", "chosen": ' {"a": 1}', "rejected": " {"}]
    assert alike == 2


def test_wilson_interval_by_the_textbook():
    # Solves (p - share)^2 = z^2 p (1 - p) / n, which is what the interval means.
    for successes, trials in ((0, 40), (13, 40), (40, 40)):
        estimate = wilson_interval(successes, trials)
        for end in (estimate.low, estimate.high):
            assert (end - successes / trials) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, abs=1e-12)


def test_bootstrap_interval_covers_at_its_rate():
    rng = np.random.default_rng(1)
    covered = [
        (interval := bootstrap_interval(rng.normal(0.3, 1, 80), resamples=500)).low <= 0.3 <= interval.high
        for _ in range(200)
    ]
    assert 0.88 < np.mean(covered) < 0.99


def test_mean_logps_of_each_kind():
    answers = [Answer(" {}", [1, 2]), Answer(" {", [1]), Answer(' {"a": 1}', [1, 2, 3, 4])]
    means = mean_logps(np.array([-1.0, -3.0, -2.0]), answers)
    assert means == {"parsing": -1.5, "parsing_per_token": -0.5, "broken": -3.0, "broken_per_token": -3.0}
    assert math.isnan(mean_logps(np.array([-1.0]), answers[:1])["broken"])


def test_the_demo_raises_what_is_wanted(demo):
    out, summary, printed = demo
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["rise"]["low"] > 0, "the interval of the rise does not exclude zero"
    assert summary["after"]["sampled_parse"]["low"] > summary["before"]["sampled_parse"]["high"]
    assert summary["after"]["greedy_parse"]["value"] > summary["before"]["greedy_parse"]["value"]
    gap = {when: logps["parsing"] - logps["broken"] for when, logps in summary["logps"].items()}
    assert gap["after"] > gap["before"]
    for words in ("of the sampled answers parse", "1. base model", "5. after", "What changed"):
        assert words in printed


def test_the_summary_can_be_had_again_from_the_folder(demo):
    """Counts the recorded answers, and generates some again with the saved models."""
    out, summary, _ = demo
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for when, folder in (("before", "base"), ("after", "run/final")):
        answers = [text for row in samples for text in row[when]["sampled"]]
        assert np.mean([parses(text) for text in answers]) == pytest.approx(summary[when]["sampled_parse"]["value"])
        assert np.mean([parses(row[when]["greedy"]) for row in samples]) == summary[when]["greedy_parse"]["value"]
        model, tokenizer = load(out / folder)
        again = generate(model, tokenizer, [row["prompt"] for row in samples], temperature=0)
        assert [answers[0].text for answers in again] == [row[when]["greedy"] for row in samples]


def test_held_out_prompts_are_in_no_pair(demo):
    out, _, _ = demo
    held_out = {json.loads(line)["prompt"] for line in (out / "samples.jsonl").read_text().splitlines()}
    paired = {json.loads(line)["prompt"] for line in (out / "pairs.jsonl").read_text().splitlines()}
    assert held_out
    assert paired
    assert not held_out & paired


def test_answer_logps_equal_one_answer_at_a_time(demo):
    model, tokenizer = load(demo[0] / "base")
    prompts = [prompt_text(FIELDS), "age=9 ->", "pet=cat city=Oslo ->"]
    answers = [tokens[0] for tokens in generate(model, tokenizer, prompts, temperature=1.0, seed=5)]
    together = answer_logps(model, tokenizer, prompts, answers)
    for prompt, answer, logp in zip(prompts, answers, together, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        logits = model(torch.tensor([prompt_ids + answer.ids])).logits[0].double().log_softmax(-1)
        alone = sum(logits[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(answer.ids))
        assert logp == pytest.approx(alone, abs=1e-4)


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
