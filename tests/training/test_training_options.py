"""Runs with each loss, and the options that give a run more state: moving references, reward shifts, weights."""

import json

import numpy as np
import pytest
import torch
from oracle import SENTENCES, random_groups, tiny_llama
from rich.console import Console
from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES
from dpo_fast.losses.facts import FACTS
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import pack
from dpo_fast.reference.moving import MovingReference
from dpo_fast.training.run import train
from dpo_fast.training.step import RewardShift

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    words = " ".join(SENTENCES).split()
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {
            "prompt": words[i],
            "chosen": " " + " ".join(words[i + 5 : i + 7 + i % 3]),
            "rejected": " " + " ".join(words[i + 9 : i + 10 + i % 6]),
            "margin": 0.5 + i,
            "weight": i % 3,
            "best": f" {words[i + 1]}",
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(make_config, rows):
    return lambda **changes: make_config(**{"data": rows, "max_steps": 3} | changes)


def weights(result):
    return load_file(result.model_dir / "model.safetensors")


def losses(result):
    return [row["loss"] for row in result.metrics if "loss" in row]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_trains(name, config, tmp_path):
    extra = {"margin_column": "margin", "gold_column": "best", "eval_split": 0.25}
    if "label_smoothing" in FACTS[name].options:
        extra["label_smoothing"] = 0.1
    result = train(config(loss_type=name, **extra), console=QUIET)
    assert np.isfinite(losses(result)).all()
    assert np.isfinite([row["eval_loss"] for row in result.metrics if "eval_loss" in row]).all()
    # Where no loss compares with a reference, none is scored.
    assert (tmp_path / "reference.sqlite").exists() is FACTS[name].needs_reference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "rpo"}, "rpo: needs true scores, and row 0 has none"),
        ({"loss_type": "tpo"}, "tpo: needs a third, better answer; name its column by --gold_column"),
        ({"loss_type": "aot", "use_weighting": True}, "aot sorts the pairs, so they cannot have weights"),
        ({"loss_type": "aot", "weight_column": "weight"}, "aot: sorts the pairs, so they cannot have weights"),
        ({"loss_type": "simpo", "sync_ref_model": True}, "simpo has no reference"),
        (
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0},
            r"--ref_model_mixup_alpha 0.0: expected a number",
        ),
        ({"ld_alpha": 1.5}, r"--ld_alpha 1.5: expected a number in \[0, 1\]"),
    ],
    ids=str,
)
def test_what_a_loss_cannot_have_is_refused(changes, message, config):
    with pytest.raises(UserError, match=message):
        train(config(**changes), console=QUIET)


def test_rows_weigh_what_their_column_says(config):
    """Weight 0 is no row: the loss is the weighted mean of the rows' losses over the number of rows."""
    plain = train(config(max_steps=1, per_device_train_batch_size=8, overwrite=True), console=QUIET)
    weighted = train(
        config(max_steps=1, per_device_train_batch_size=8, overwrite=True, weight_column="weight"), console=QUIET
    )
    assert losses(weighted)[0] == pytest.approx(losses(plain)[0] * (3 * 0 + 3 * 1 + 2 * 2) / 8, abs=1e-6)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}], ids=str)
def test_token_level_options_train_alike_in_any_packs(options, config):
    """A step's loss does not depend on how it is cut into packs."""
    one, many = (
        train(config(overwrite=True, max_tokens_per_batch=budget, **options), console=QUIET) for budget in (4096, 8)
    )
    assert losses(one) == pytest.approx(losses(many), abs=1e-5)
    assert losses(one) != pytest.approx(losses(train(config(overwrite=True), console=QUIET)), abs=1e-5)


def test_static_shapes_fill_every_pack_and_change_no_loss(config):
    settings = {"max_tokens_per_batch": 40, "overwrite": True, "learning_rate": 1e-3}
    plain, filled = (train(config(static_shapes=on, **settings), console=QUIET) for on in (False, True))
    assert losses(filled) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(plain)[-1] != pytest.approx(losses(plain)[0], abs=1e-4)
    assert [row["padding_share"] for row in plain.metrics] == [0] * len(plain.metrics)
    for row in filled.metrics:
        assert 0 < row["padding_share"] == pytest.approx(1 - row["pack_fill"])


def policy_of(seed):
    model = tiny_llama(seed=seed)
    use_packed_attention(model)
    return Policy(model, device=torch.device("cpu"), bf16=False, memory_budget=2**20)


def test_a_moving_reference_is_mixed_with_the_policy():
    policy, reference = policy_of(1), policy_of(2)
    old = {name: x.clone() for name, x in reference.model.named_parameters()}
    moving = MovingReference(reference, sync_steps=2, alpha=0.6)
    moving.after_step(1, policy)
    assert all(torch.equal(x, old[name]) for name, x in reference.model.named_parameters())
    moving.after_step(2, policy)
    for name, x in policy.model.named_parameters():
        torch.testing.assert_close(reference.model.get_parameter(name), 0.6 * x + 0.4 * old[name])
    batch = pack(random_groups(3))
    assert torch.equal(moving.score(batch), reference.score(batch))


def test_a_reference_that_follows_completely_starts_each_step_at_ln_2(config):
    result = train(config(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0), console=QUIET)
    assert losses(result) == pytest.approx([np.log(2)] * 3, abs=1e-6)
    slow = train(config(sync_ref_model=True, ref_model_sync_steps=100, overwrite=True), console=QUIET)
    fixed = train(config(overwrite=True), console=QUIET)
    assert losses(slow) == pytest.approx(losses(fixed), abs=1e-6)


def test_the_reward_shift_is_the_mean_over_earlier_steps():
    shift = RewardShift()
    assert shift.value is None
    shift.add(torch.tensor(6.0, dtype=torch.float64), 2)
    shift.add(torch.tensor(-2.0, dtype=torch.float64), 6)
    assert shift.value == pytest.approx(4 / 16)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "bco"}, {"sync_ref_model": True, "ref_model_sync_steps": 2}, {"loss_type": "orpo"}],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(options, config, tmp_path):
    settings = {"save_steps": 3, "max_steps": 5, **options}
    whole = train(config(output_dir=str(tmp_path / "whole"), **settings), console=QUIET)
    train(config(output_dir=str(tmp_path / "cut"), **settings), console=QUIET)
    (tmp_path / "cut" / "final").rename(tmp_path / "final")
    resumed = train(config(output_dir=str(tmp_path / "cut"), resume="auto", **settings), console=QUIET)
    for name, x in weights(whole).items():
        assert torch.equal(x, weights(resumed)[name]), name
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_of_another_loss_is_refused(config):
    train(config(save_steps=2), console=QUIET)
    with pytest.raises(UserError, match="--loss_type bco, was sigmoid: may not change"):
        train(config(resume="auto", loss_type="bco"), console=QUIET)
