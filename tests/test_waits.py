"""No step waits for the device but to report, and then once."""

from dataclasses import replace

import pytest
import torch
from oracle import random_groups, tiny_llama
from trl_runs import IGNORED, make_trainer
from waits import waits

from dpo_fast.batch import pack
from dpo_fast.config import LossConfig
from dpo_fast.guards import FiniteWatch
from dpo_fast.integrations.trl import DPOTrainer
from dpo_fast.metrics import Window
from dpo_fast.model import Policy, use_packed_attention
from dpo_fast.step import backward


def scored_batch(policy):
    batch = pack(random_groups(3))
    return replace(batch, ref_logps=policy.score(batch))


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"loss_type": ["aot", "sft_tokens", "kto"]},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(loss):
    model = tiny_llama()
    use_packed_attention(model)
    policy = Policy(model, device=torch.device("cpu"), bf16=False, memory_budget=2**30)
    batch = scored_batch(policy)
    window, watch = Window(1000), FiniteWatch()
    with waits() as found:
        metrics = backward(policy, batch, LossConfig(**loss), 3)
        window.add(batch, metrics)
        watch.add(1, batch.pair_rows, metrics[0].isfinite())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not found
    with waits() as found:
        row = window.read({"grad_norm": norm, "all_finite": watch.all_finite})
    assert sum(found.values()) == 1
    assert row["grad_norm"] == norm.item()
    assert row["all_finite"] == 1


@pytest.mark.filterwarnings(*IGNORED)
def test_trls_loop_waits_for_ours_once_a_report(tmp_path):
    extra = {"reference_store": tmp_path / "reference.sqlite"}
    trainer = make_trainer(DPOTrainer, tmp_path, extra=extra, max_steps=6, logging_steps=3)
    with waits() as found:
        trainer.train()
    ours = {asker: count for asker, count in found.items() if asker.startswith(("trl", "dpo_trainer"))}
    assert ours == {"trl_metrics.read": 2}


def test_the_counter_counts():
    x = torch.tensor([1.0, 2.0])
    with waits() as found:
        x.sum().item(), bool(x[0] > 0), x.tolist(), x.nonzero(), x[x > 1], torch.equal(x, x)
        torch.repeat_interleave(x, torch.tensor([1, 2]))
        torch.repeat_interleave(x, torch.tensor([1, 2]), output_size=3)
    assert sum(found.values()) == 7
