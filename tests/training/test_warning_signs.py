"""What a run is warned of, and what not: made-up histories, and tiny runs that go wrong on purpose."""

import io
import json
import random

import numpy as np
import pytest
import torch
from healthy_runs import false_alarms, report
from oracle import SENTENCES
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.packs.layout import Group, Ranking
from dpo_fast.training.metrics import PAIR_METRICS, PairAverage
from dpo_fast.training.run import train
from dpo_fast.training.warning_signs import (
    GONE_AFTER,
    Reports,
    WarningSigns,
    both_rewards_fall,
    chosen_collapses,
    first_pairs,
    last_pairs,
    margins_follow_length,
    separated_at_first,
    separated_by_reference,
)

MANY = 10**6
WORDS = " ".join(SENTENCES).split()


def pairs_of(rng, size, *, chosen=0.0, rejected=0.0, noise=1.0, length=20):
    """Log-ratios in nats with these very means, and lengths that have nothing to do with them."""
    noises = noise * rng.normal(size=(2, size))
    if size > 1:
        noises -= noises.mean(1, keepdims=True)
    return chosen + noises[0], rejected + noises[1], rng.permutation(size) - (size - 1) / 2 + length, [length] * size


def history(size, number, **figures):
    rng = np.random.default_rng(0)
    return [report(*pairs_of(rng, size, **figures)) for _ in range(number)]


# What the figures are made of.


def test_spreads_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.3, 2, 50), rng.normal(-1, 3, 50)
    chosen_len, rejected_len = rng.integers(1, 900, 50), rng.integers(1, 900, 50)
    chosen += 0.004 * chosen_len
    block = np.zeros((len(PAIR_METRICS), 50), dtype=np.float32)
    figures = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    for name, values in (figures | {"lengths/chosen": chosen_len, "lengths/rejected": rejected_len}).items():
        block[PAIR_METRICS.index(name)] = values
    average = PairAverage()
    for part in np.split(block, [7, 8, 30], axis=1):
        average.add(torch.from_numpy(part))
    row = average.read()
    expected = report(chosen, rejected, chosen_len, rejected_len, beta=1)
    for name in expected.keys() - {"rewards/accuracies"}:
        assert row[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("same", ["lengths", "margins", "all"])
def test_what_does_not_vary_has_no_correlation(same):
    """Whatever the sums round to."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        block = torch.rand(len(PAIR_METRICS), 49, generator=generator) * 1000
        if same != "margins":
            lengths = [PAIR_METRICS.index(f"lengths/{side}") for side in ("chosen", "rejected")]
            block[lengths] = block[lengths, :1]
        if same != "lengths":
            block[1:3] = block[1:3, :1]
        average = PairAverage()
        average.add(block)
        row = average.read()
        assert row["lengths/margins_correlation"] == 0.0
        assert same == "lengths" or row["rewards/margins_std"] == 0


def test_reports_together_are_one_report_of_all_their_pairs():
    rng = np.random.default_rng(1)
    parts = [pairs_of(rng, size, chosen=size / 9, rejected=-1.0) for size in (1, 2, 40, 30)]
    parts = [(c + 0.2 * lc, r, 9 + lc, lr) for c, r, lc, lr in parts]
    whole = report(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    together = Reports([report(*part) for part in parts], MANY)
    assert together.num_pairs == 73
    for side in ("chosen", "rejected", "margins"):
        mean, error = together.reward(side)
        assert mean == pytest.approx(whole[f"rewards/{side}"])
        assert error == pytest.approx(whole[f"rewards/{side}_std"] / np.sqrt(73))
    chosen, rejected, chosen_len, rejected_len = (np.concatenate(column) for column in zip(*parts, strict=True))
    design = np.stack([np.ones(73), chosen_len - rejected_len], 1)
    margin = 0.1 * (chosen - rejected)
    solution, (rest,), *_ = np.linalg.lstsq(design, margin)
    error = np.sqrt(np.linalg.inv(design.T @ design)[0, 0] * rest / 71)
    correlation = np.corrcoef(margin, design[:, 1])[0, 1]
    assert together.margin_by_length() == pytest.approx((correlation, solution[1], solution[0], error))


def test_an_end_or_beginning_holds_just_enough_pairs():
    rows = [{"num_pairs": n, "name": i} for i, n in enumerate((1, 8, 8, 4))]
    assert [row["name"] for row in last_pairs(rows, 4)] == [3]
    assert [row["name"] for row in last_pairs(rows, 5)] == [2, 3]
    assert [row["name"] for row in first_pairs(rows, 2)] == [0, 1]
    assert first_pairs(rows, 50) == last_pairs(rows, 50) == rows


# Both rewards fall, the chosen log-prob collapses.


def test_rewards_that_both_fall():
    text = both_rewards_fall(history(8, 10, chosen=-3.0, rejected=-7.0), DPOConfig(), MANY)
    assert text.startswith("both rewards fall: over the last 64 pairs the chosen answers are 3.0 ")
    assert "nats less likely than at the start (0.15 a token), the rejected ones 7.0." in text
    assert text.endswith("hold the chosen answers up with --loss_type '[sigmoid, sft]' or --loss_type dpop")


@pytest.mark.parametrize(
    "figures",
    [
        {"chosen": -3.0, "rejected": 3.0},
        {"chosen": 3.0, "rejected": -3.0},
        {"chosen": -0.8, "rejected": -9.0, "noise": 0.1, "length": 9},  # a trifle
        {"chosen": -3.0, "rejected": -9.0, "length": 400},  # a trifle for each token
        {"chosen": -3.0, "rejected": -9.0, "noise": 8.0},  # three standard errors
    ],
    ids=str,
)
def test_rewards_that_do_not_both_fall(figures):
    assert both_rewards_fall(history(8, 30, **figures), DPOConfig(), MANY) is None


def test_a_loss_that_is_made_to_lower_both_is_left_alone():
    assert both_rewards_fall(history(8, 10, chosen=-3.0, rejected=-7.0), DPOConfig(loss_type="apo_down"), MANY) is None


def test_a_chosen_answer_that_collapses():
    text = chosen_collapses(history(8, 10, chosen=-20.0, rejected=5.0), DPOConfig(), MANY)
    assert "2.7 times less likely than at the start (1.00 nats a token, 20.0 an answer)" in text
    assert "--loss_type '[sigmoid, sft]' or --loss_type dpop" in text


@pytest.mark.parametrize(
    "figures",
    [
        {"chosen": -9.0},  # less than half a nat a token
        {"chosen": -2.0, "noise": 0.1, "length": 3},  # a few nats of a short answer
        {"chosen": 20.0},
        {"chosen": -20.0, "noise": 60.0},
    ],
    ids=str,
)
def test_a_chosen_answer_that_does_not_collapse(figures):
    assert chosen_collapses(history(8, 10, **figures), DPOConfig(), MANY) is None


@pytest.mark.parametrize("loss", [{"loss_type": "simpo"}, {"ref_model": "another"}], ids=str)
def test_a_run_that_does_not_start_at_rewards_of_0_is_compared_with_its_first_pairs(loss):
    config = DPOConfig(**loss)
    low = history(8, 8, chosen=-40.0, rejected=-50.0)
    assert both_rewards_fall(low + low, config, MANY) is None
    assert chosen_collapses(low + low, config, MANY) is None
    # The first pairs and the last must be different ones.
    lower = history(8, 8, chosen=-60.0, rejected=-80.0)
    assert both_rewards_fall((low + lower)[1:15], config, MANY) is None
    assert "20.0 nats" in both_rewards_fall(low + lower, config, MANY)
    assert "1.00 nats a token, 20.0 an answer" in chosen_collapses(low + lower, config, MANY)
    assert both_rewards_fall(low + lower, DPOConfig(**loss, sync_ref_model=True), MANY) is None


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}, "'[sigmoid, ipo, sft]' --loss_weights '[1.0, "),
        ({"loss_type": ["sigmoid", "sft"]}, "a larger weight of sft in --loss_weights"),
        ({"loss_type": "dpop"}, "--loss_type '[dpop, sft]'"),
        ({"loss_type": "mine:loss"}, "--loss_type '[mine:loss, sft]'"),
    ],
)
def test_the_cure_is_what_is_not_set_yet(settings, cure):
    text = both_rewards_fall(history(8, 10, chosen=-3.0, rejected=-7.0), DPOConfig(**settings), MANY)
    assert cure in text
    assert "or --loss_type dpop" not in text


# Margins follow length.


def by_length(number, *, size=8, slope=0.5, intercept=0.0, longer=10.0, noise=2.0, seed=0):
    """Reports whose margins are slope x gap + intercept, in nats, half on each side."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        gap = rng.normal(longer, 10, size)
        margin = slope * gap + intercept + noise * rng.normal(size=size)
        rows.append(report(margin / 2, -margin / 2, 60 + gap, np.full(size, 60)))
    return rows


def test_margins_that_follow_length():
    text = margins_follow_length(by_length(40), DPOConfig(), MANY)
    assert text.startswith("margins follow length: over the last 256 pairs a margin grows with how much longer the ")
    assert "correlation +0.9" in text
    assert "--balance_length true" in text
    assert "--loss_type sigmoid_norm" in text
    assert text.endswith("--ld_alpha 0.5")


def test_margins_that_follow_shortness():
    rows = by_length(40, slope=-0.5, longer=-10.0)
    assert "how much shorter the chosen answer is (correlation -0.9" in margins_follow_length(rows, DPOConfig(), MANY)


def test_ld_alpha_is_not_recommended_to_those_who_have_it():
    assert "ld_alpha" not in margins_follow_length(by_length(40), DPOConfig(ld_alpha=0.9), MANY)


@pytest.mark.parametrize(
    "figures",
    [
        {"slope": 0.0, "intercept": 5.0},
        {"noise": 6.0},  # a correlation of 0.64
        {"intercept": 8.0},  # equally long answers have most of the margin
        {"longer": 0.0, "intercept": 3.0},  # balanced data
        {"slope": 0.05, "noise": 0.1},  # half a nat in all
        {"slope": -0.5},  # no margin yet
    ],
    ids=str,
)
def test_margins_that_do_not_follow_length(figures):
    assert margins_follow_length(by_length(40, **figures), DPOConfig(), MANY) is None


def test_what_earlier_passes_over_the_pairs_had_is_not_mixed_in():
    passes = [by_length(12, slope=slope) for slope in (0.01, 0.2, 0.5)]
    text = margins_follow_length(passes[0] + passes[1] + passes[2], DPOConfig(), 96)
    assert text == margins_follow_length(passes[-1], DPOConfig(), 96)
    assert "over the last 96 pairs" in text


@pytest.mark.parametrize("loss", ["sigmoid_norm", ["ipo", "sft"], "cpo"], ids=str)
def test_losses_of_averages_or_without_a_reference_have_no_such_warning(loss):
    assert margins_follow_length(by_length(40), DPOConfig(loss_type=loss), MANY) is None


# Separated at step 0.


def test_separated_from_another_reference():
    config = DPOConfig(ref_model="another")
    rows = history(16, 5, chosen=20.0, rejected=-20.0)
    texts = [separated_at_first(rows[: i + 1], config, MANY) for i in range(5)]
    assert [text is not None for text in texts] == [False, False, False, True, False]
    assert "accuracy of 100% against the reference and a mean margin of 4.0" in texts[3]
    assert separated_at_first(rows[:4], DPOConfig(), MANY) is None
    assert separated_at_first(rows[:4], DPOConfig(ref_model="another", loss_type="simpo"), MANY) is None


@pytest.mark.parametrize("figures", [{"chosen": 15.0}, {"chosen": 30.0, "noise": 25.0}], ids=str)
def test_not_separated_from_another_reference(figures):
    assert separated_at_first(history(16, 4, **figures), DPOConfig(ref_model="another"), MANY) is None


def scored_groups(number, chosen, rejected):
    """Groups of a pair whose answers have these log-probs, token by token."""
    answers = (np.zeros(len(chosen), np.int32), np.zeros(len(rejected), np.int32))
    groups = [Group(i, np.zeros(2, np.int32), answers) for i in range(number)]
    return groups, [(np.array(chosen, np.float32), np.array(rejected, np.float32))] * number


EASY = ([-0.5] * 6, [-4.0] * 5)
HARD = ([-0.5] * 6, [-1.0] * 6)


def test_separated_by_the_reference():
    easy, hard = scored_groups(40, *EASY), scored_groups(30, *HARD)
    groups, references = easy[0] + hard[0], easy[1] + hard[1]
    text = separated_by_reference(groups, references)
    assert "the chosen answer of 57% of 70 pairs" in text
    assert "(mean difference 2.2 nats a token)" in text
    assert separated_by_reference(groups[10:] + hard[0], references[10:] + hard[1]) is None
    assert separated_by_reference(groups[5:-5] + hard[0][:5], references[5:-5] + hard[1][:5]) is not None
    assert separated_by_reference(groups[5:] + hard[0][:5], references[5:] + hard[1][:5]) is None
    # Rows that the run does not reach count on neither side.
    text = separated_by_reference(groups + hard[0], references + [()] * 30)
    assert "57% of 70 pairs" in text


@pytest.mark.parametrize(
    "answers",
    [
        HARD,
        ([-0.2], [-1.7]),  # one token; the model gives the rejected one every fifth time
        ([-0.5] * 3, [-0.9] * 90),  # less likely because it is longer
        ([-1.0] * 90, [-8.0]),  # less likely a token, likelier in all
    ],
    ids=str,
)
def test_not_separated_by_the_reference(answers):
    assert separated_by_reference(*scored_groups(100, *answers)) is None


def test_every_pair_of_a_group_counts():
    answers = tuple(np.zeros(n, np.int32) for n in (6, 5, 6))
    groups = [Group(i, np.zeros(2, np.int32), answers, Ranking(((0, 1), (0, 2)))) for i in range(32)]
    scores = tuple(np.full(n, logp, np.float32) for n, logp in ((6, -0.5), (5, -4.0), (6, -9.0)))
    assert "100% of 64 pairs" in separated_by_reference(groups, [scores] * 32)
    assert separated_by_reference(groups[:31], [scores] * 31) is None


# When and how often.


EXTREME = {
    "falling": lambda: history(4, 15, chosen=-500.0, rejected=-900.0),
    "length": lambda: by_length(15, size=4),
}


@pytest.mark.parametrize("name", EXTREME)
def test_a_few_pairs_say_nothing(name):
    rows = EXTREME[name]()
    assert not [text for row in rows for text in WarningSigns(DPOConfig(), MANY).observe(row)]
    # The same few pairs, again and again.
    signs = WarningSigns(DPOConfig(), num_pairs=60)
    assert not [text for row in rows * 20 for text in signs.observe(row)]
    signs = WarningSigns(DPOConfig(), num_pairs=64)
    assert [text for row in rows * 20 for text in signs.observe(row)]


@pytest.mark.slow
def test_healthy_runs_are_not_warned_of():
    counts, texts = false_alarms(12)
    assert not counts.total(), texts


def test_a_warning_is_given_once_and_again_when_it_had_gone():
    signs = WarningSigns(DPOConfig(), MANY, ["before the first step"])
    bad, good = history(64, 1, chosen=-3.0, rejected=-7.0), history(64, 1, chosen=3.0, rejected=-7.0)
    rows = bad * 9 + good * (GONE_AFTER - 1) + bad * 2 + good * GONE_AFTER + bad * 2
    given = [signs.observe(row) for row in rows]
    again = 9 + GONE_AFTER - 1 + 2 + GONE_AFTER
    assert [i for i, texts in enumerate(given) if texts] == [0, again]
    assert [text.split(":")[0] for text in given[0]] == ["before the first step", "both rewards fall"]
    assert [text.split(":")[0] for text in given[again]] == ["both rewards fall"]


def test_rows_of_evaluations_and_of_older_versions_say_nothing():
    signs = WarningSigns(DPOConfig(), MANY, ["before the first step"])
    assert signs.observe({"eval_loss": 0.5, "step": 1}) == []
    assert signs.observe({"loss": 0.5, "rewards/chosen": -9.0, "step": 1}) == []
    assert signs.observe(history(1, 1)[0]) == ["before the first step"]


# Tiny runs.


def say(rng, number):
    return " " + " ".join(rng.choice(WORDS) for _ in range(number))


def plain(rng):
    return say(rng, rng.randint(2, 8)), say(rng, rng.randint(2, 8))


def alike(rng):
    """Two answers that differ in a word, so that what lowers one lowers the other."""
    words = [rng.choice(WORDS) for _ in range(8)]
    place = rng.randrange(8)
    return " " + " ".join(words), " " + " ".join([*words[:place], rng.choice(WORDS), *words[place + 1 :]])


def longer(rng):
    number = rng.randint(1, 4)
    return say(rng, number + rng.randint(0, 14)), say(rng, number)


def known(rng):
    return " " + rng.choice(SENTENCES), say(rng, 12)


@pytest.fixture
def run(base, tmp_path):
    def go(make_pair, num_rows=96, **changes):
        rng = random.Random(0)
        data = tmp_path / f"{make_pair.__name__}.jsonl"
        if not data.exists():
            rows = [{"prompt": f"{i} {say(rng, 2)}", **answers(make_pair(rng))} for i in range(num_rows)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model": base,
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
            "reference_store": str(tmp_path / "reference.sqlite"),
            "max_length": 128,
            "per_device_train_batch_size": 16,
            "logging_steps": 1,
            "save_steps": 0,
            "overwrite": "resume" not in changes,
        }
        console = Console(file=io.StringIO(), width=80)
        result = train(DPOConfig(**settings | changes), console=console)
        return result, warnings_of(result), console.file.getvalue()

    return go


def answers(pair):
    return dict(zip(("chosen", "rejected"), pair, strict=True))


def warnings_of(result):
    return {text.split(":")[0]: row["step"] for row in result.metrics for text in row.get("warnings", ())}


@pytest.mark.slow
def test_a_healthy_run_is_not_warned_of(run):
    result, warnings, output = run(plain, learning_rate=1e-3, max_steps=18)
    assert result.metrics[-1]["rewards/accuracies"] == 1
    assert warnings == {}
    assert "warning (" not in output
    assert not any("warnings" in row for row in result.metrics)


TOO_HIGH = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "seed": 2}


@pytest.mark.slow
def test_a_high_learning_rate_lets_both_rewards_fall_and_the_chosen_collapse(run):
    result, warnings, output = run(alike, max_steps=12, **TOO_HIGH)
    assert warnings.keys() == {"both rewards fall", "the chosen log-prob collapses"}
    assert result.step == 12
    lines = [line for line in output.splitlines() if line.startswith("warning")]
    texts = [(row["step"], text) for row in result.metrics for text in row.get("warnings", ())]
    assert lines == [f"warning (step {step}): {text}" for step, text in texts]
    # The cure that the warning names.
    cured = run(alike, max_steps=12, **TOO_HIGH | {"learning_rate": 0.01, "loss_type": ["sigmoid", "sft"]})
    assert cured[1] == {}


@pytest.mark.slow
def test_a_warning_from_before_is_not_given_again_after_a_resume(run, tmp_path):
    settings = {"max_steps": 18, "save_steps": 6, **TOO_HIGH}
    whole, warnings, _ = run(alike, **settings)
    for step in (12, 18):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    again, warnings_again, output = run(alike, resume="auto", **settings)
    assert warnings
    assert max(warnings.values()) <= 6
    assert warnings_again == warnings
    assert "warning (" not in output
    assert [row.get("warnings") for row in again.metrics] == [row.get("warnings") for row in whole.metrics]


@pytest.mark.slow
def test_chosen_answers_that_are_always_longer(run):
    settings = {"learning_rate": 3e-4, "max_steps": 36, "per_device_train_batch_size": 32}
    _, warnings, _ = run(longer, num_rows=192, **settings)
    assert warnings.keys() == {"margins follow length"}
    normalised = run(longer, loss_type="sigmoid_norm", beta=2.0, **settings)
    assert normalised[1] == {}


@pytest.fixture
def knowing(run, tmp_path):
    """The model, once it knows the chosen answers by heart."""
    settings = {"learning_rate": 1e-2, "max_steps": 30, "loss_type": "sft", "output_dir": str(tmp_path / "sft")}
    result, warnings, _ = run(known, **settings)
    assert warnings == {}
    return str(result.model_dir)


@pytest.mark.slow
def test_a_model_that_knows_the_chosen_answers_already(run, knowing, tmp_path):
    settings = {"model": knowing, "learning_rate": 1e-5, "max_steps": 6, "save_steps": 3}
    _, warnings, output = run(known, **settings)
    assert warnings == {"most pairs are separated already": 1}
    assert "warning (step 1): most pairs are separated already: before step 1 the model finds" in output
    assert run(known, ref_model=knowing, **settings)[1] == warnings
    begun = str(tmp_path / "run" / "checkpoint-3")
    assert run(known, resume=begun, output_dir=str(tmp_path / "elsewhere"), **settings)[1] == {}


@pytest.mark.slow
def test_a_model_that_is_far_from_its_reference_already(run, knowing, base):
    settings = {"learning_rate": 1e-5, "max_steps": 6}
    _, warnings, output = run(known, model=knowing, ref_model=base, **settings)
    assert warnings == {"most pairs are separated already": 4}
    assert "on the first 64 pairs the model has an accuracy of" in output
    # What the reference knows says nothing of another model.
    assert run(known, model=base, ref_model=knowing, **settings)[1] == {}
