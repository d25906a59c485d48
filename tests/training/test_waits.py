"""No step waits for the device but to report, and then once."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracle import random_groups, save_tiny_checkpoint, tiny_llama
from rich.console import Console
from trl_runs import IGNORED, ROWS, make_trainer
from waits import waits

from dpo_fast.config import DPOConfig, LossConfig
from dpo_fast.integrations.trl import DPOTrainer
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import pack
from dpo_fast.training.guards import FiniteWatch
from dpo_fast.training.loop import Trainer
from dpo_fast.training.metrics import Window
from dpo_fast.training.run import train
from dpo_fast.training.step import StepLoss

pytestmark = pytest.mark.slow


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
    policy = Policy(model, device=torch.device("cpu"), memory_budget=2**30)
    batch = scored_batch(policy)
    window, watch = Window(1000), FiniteWatch()
    with waits() as found:
        for pack, metrics in StepLoss(policy, LossConfig(**loss)).backward([batch, batch], 6):
            window.add(pack, metrics)
            watch.add(1, pack.pair_rows, metrics[0].isfinite())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not found
    with waits() as found:
        row = window.read({"grad_norm": norm, "all_finite": watch.all_finite})
    assert sum(found.values()) == 1
    assert row["grad_norm"] == norm.item()
    assert row["all_finite"] == 1


def test_our_loop_waits_once_a_report(tmp_path, monkeypatch):
    """Six steps, three reports (the first step is one), and step 0's check of itself."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    config = DPOConfig(
        **{
            "model": str(save_tiny_checkpoint(tmp_path / "base")),
            "data": str(rows),
            "output_dir": str(tmp_path / "run"),
        },
        **{"reference_store": str(tmp_path / "reference.sqlite"), "max_length": 64, "per_device_train_batch_size": 4},
        **{"max_steps": 6, "logging_steps": 3, "save_steps": 0},
    )
    run, found = Trainer.run, Counter()

    def counted(self):
        with waits() as asked:
            result = run(self)
        found.update(asked)
        return result

    monkeypatch.setattr(Trainer, "run", counted)
    train(config, console=Console(quiet=True))
    assert found.pop("guards.check") == 6  # on a CPU alone, where it costs nothing: after every step
    assert found.pop("objective.<genexpr>") == 1  # ln 2, of tensors on the host, for step 0
    assert found.pop("finite.not_finite") == 1  # the weights before they are saved
    assert found == {"metrics.read": 3 + 1}


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
