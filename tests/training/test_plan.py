"""The plan of a run, against figures worked out by hand."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.packs.layout import Group
from dpo_fast.ranks import Ranks
from dpo_fast.training.plan import Plan
from dpo_fast.training.run import train


def group(row, prompt, *answers):
    return Group(row, np.zeros(prompt, np.int32), tuple(np.zeros(n, np.int32) for n in answers))


# 10 + 4 + 6 and 20 + 2 + 3 tokens with a prompt each; 10 and 20 more without sharing.
GROUPS = [group(0, 10, 4, 6), group(1, 20, 2, 3), group(2, 10, 4, 6)]


def test_batch_steps_and_budget():
    config = DPOConfig(
        model="m", max_length=32, per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=1.5
    )
    plan = Plan.of(config, GROUPS, GROUPS[:1])
    assert (plan.num_rows, plan.num_pairs, plan.num_held_out_rows) == (3, 3, 1)
    assert (plan.rows_per_step, plan.num_steps) == (2, 3)
    assert plan.max_tokens == 64
    assert plan.sharing == pytest.approx((30 + 45 + 30) / (20 + 25 + 20))
    assert plan.ranks == Ranks()
    assert plan.packs(GROUPS) == [[1, 0], [2]]
    assert [len(step.groups) for step, _ in zip(plan.sampler(GROUPS), range(2), strict=False)] == [2, 1]


@pytest.mark.parametrize(
    ("settings", "placement"),
    [
        ({}, "cpu, float32 weights"),
        ({"dtype": "bfloat16"}, "cpu, bfloat16 weights"),
        ({"dtype": "bfloat16", "bf16": True}, "cpu, bfloat16 weights"),
        ({"bf16": True}, "cpu, float32 weights, bfloat16 autocast"),
    ],
    ids=str,
)
def test_precision_is_said(settings, placement):
    plan = Plan.of(DPOConfig(model="m", device="cpu", **settings), GROUPS, [])
    assert str(plan.placement) == placement
    assert f"\n{placement}, 1 process, reference: m, scored once" in str(plan)
    assert plan.placement.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"loss_type": "simpo"}, "none"),
        ({"ref_model": "r"}, "r, scored once"),
        ({"sync_ref_model": True}, "m, which follows the policy"),
    ],
    ids=str,
)
def test_the_reference_is_said(settings, reference):
    assert str(Plan.of(DPOConfig(model="m", **settings), GROUPS, [])).endswith(f"reference: {reference}")


def test_a_dry_run_prints_the_plan_and_loads_no_model(base, tmp_path, monkeypatch):
    from dpo_fast.model.policy import Policy

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n' * 3)
    monkeypatch.setattr(Policy, "load", None)
    out = io.StringIO()
    config = DPOConfig(model=base, data=str(data), output_dir=str(tmp_path / "run"), device="cpu", dry_run=True)
    train(config, console=Console(file=out, width=200))
    assert f"cpu, float32 weights, 1 process, reference: {base}, scored once" in out.getvalue()
    assert not (tmp_path / "run").exists()
