"""Ten steps of a tiny model on a few rows, by TRL 1.16's trainer or by one of ours."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import get_sampler
from datasets import Dataset
from oracle import SENTENCES, tiny_llama, tiny_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig

WORDS = " ".join(SENTENCES).split()
ROWS = [
    {
        "prompt": " ".join(WORDS[i : i + 1 + i % 5]),
        "chosen": " " + " ".join(WORDS[i + 5 : i + 7 + i % 3]),
        "rejected": " " + " ".join(WORDS[i + 9 : i + 10 + i % 6]),
    }
    for i in range(22)
]
# transformers renames arguments that TRL 1.16 still uses, and has no say in what a CPU pins.
IGNORED = (
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
)

# Speeds differ, and are what this is for.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "total_flos")


class Records(TrainerCallback):
    """What was logged, step by step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trl_args(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 24,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return DPOConfig(**settings | changes)


def make_trainer(trainer_class, folder, *, model=None, extra=None, **changes):
    """A trainer on `ROWS`, with records of its logs as `trainer.records`."""
    tokenizer = tiny_tokenizer()
    records = Records()
    settings = {
        "model": tiny_llama(len(tokenizer)) if model is None else model,
        "args": trl_args(folder, **changes),
        "train_dataset": Dataset.from_list(ROWS[:18]),
        "processing_class": tokenizer,
        "callbacks": [records],
    }
    trainer = trainer_class(**settings | (extra or {}))
    trainer.records = records
    return trainer


def figures(logs):
    return [{k: v for k, v in line.items() if not k.endswith(SPEEDS)} for line in logs]


def assert_same_logs(got, want):
    assert len(got) == len(want) > 0
    for ours, theirs in zip(figures(got), figures(want), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, theirs)


def assert_same_run(ours, theirs):
    """Two trainers that have trained."""
    assert_same_logs(ours.records.logs, theirs.records.logs)
    for (name, got), want in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=name)


def train_on_rank(rank, world_size, trainer_class, folder: Path, extra):
    """One process of a group; the first writes its logs and weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "-"}
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "MASTER_PORT": "0"}
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    trainer = make_trainer(trainer_class, folder, ddp_backend="gloo", extra=extra)
    trainer.train()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    # Of the steps of an epoch, what this process has to compute.
    tokens = [int(batch["input_ids"].numel()) for batch in loader]
    torch.save((type(get_sampler(loader)).__name__, tokens), folder / f"batches-{rank}.pt")
    if rank == 0:
        torch.save((trainer.records.logs, trainer.model.state_dict()), folder / "result.pt")
    torch.distributed.barrier()
    # Tearing down DDP joins gloo's threads while holding the lock that they may be waiting for: leave without it.
    os._exit(0)
