"""Runs of training that are killed and stopped at random moments, and files of theirs that are damaged in between."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from attacks import attack, flip_a_bit
from oracle import save_tiny_checkpoint
from small_runs import QUIET, assert_same_weights, finish, start_train, write_rows

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.training.run import train

STEPS = 8


@functools.cache
def scratch() -> Path:
    """A folder with a model and rows, for all attacks of this process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_tiny_checkpoint(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def make_config(folder: Path, **changes: Any) -> DPOConfig:
    """A run of eight steps in `folder`."""
    settings = {
        **{"model": str(scratch() / "model"), "data": str(scratch() / "rows.jsonl"), "output_dir": str(folder / "run")},
        **{"reference_store": str(folder / "reference.sqlite"), "max_length": 64, "per_device_train_batch_size": 4},
        **{"learning_rate": 1e-3, "logging_steps": 1, "max_steps": STEPS, "max_tokens_per_batch": 90},
    }
    return DPOConfig(**settings | changes)


@functools.cache
def whole_run(**changes: Any) -> Path:
    """The folder of a run that nothing happened to."""
    folder = scratch() / f"whole-{len(list(scratch().iterdir()))}"
    folder.mkdir()
    train(make_config(folder, **changes), console=QUIET)
    return folder


def check_result(folder: Path, whole: Path) -> None:
    """The final model has the same bits, every step was reported, and nothing is left lying around."""
    assert_same_weights(folder / "run" / "final", whole / "run" / "final")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS, f"{len(lines)} rows of metrics"
    left = [path.name for path in (folder / "run").iterdir() if path.name.startswith(".")]
    assert not left, left


def interrupt(config: DPOConfig, folder: Path, rng: random.Random, *, seconds: float) -> int:
    """Start a run and kill or stop it after a random time; its exit code."""
    log = folder / "log"
    slow = ("dpo_fast.training.loop:Trainer.train_step", "dpo_fast.files:_seal", "dpo_fast.model.policy:Policy.score")
    process = start_train(config, log, slow=slow, delay=0.01)
    time.sleep(rng.uniform(0, seconds))
    for number in rng.choice([[signal.SIGKILL], [signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGHUP] * 3]):
        with suppress(ProcessLookupError):  # it may end in between
            if process.is_alive():
                os.kill(process.pid, number)
        time.sleep(rng.uniform(0, 0.1))
    return finish(process, log)


@attack
def kills_and_stops(rng: random.Random, folder: Path) -> None:
    """A run that is interrupted again and again ends with the bits of one that was not."""
    settings = {"optim": rng.choice(["adamw_torch", "adamw_8bit"])}
    config = make_config(folder, save_steps=rng.choice([1, 2, 3]), resume="auto", **settings)
    for _ in range(rng.randint(1, 3)):
        interrupt(config, folder, rng, seconds=2.5)
    train(config, console=QUIET)
    check_result(folder, whole_run(**settings))


@attack
def kills_of_a_run_that_overwrites(rng: random.Random, folder: Path) -> None:
    """It never continues the run that it replaces, whenever it is killed."""
    old, new = whole_run(save_steps=3), whole_run(learning_rate=5e-3)
    shutil.copytree(old / "run", folder / "run")
    config = make_config(folder, save_steps=2, learning_rate=5e-3)
    first = DPOConfig(**vars(config) | {"overwrite": True})
    interrupt(first, folder, rng, seconds=2.5)
    is_old = (folder / "run" / "checkpoint-3").exists()
    try:
        train(DPOConfig(**vars(config) | ({"overwrite": True} if is_old else {"resume": "auto"})), console=QUIET)
    except UserError as error:
        if "belongs to run" not in str(error):
            raise
        train(first, console=QUIET)  # it was killed while the old run's files were moved
    check_result(folder, new)
    assert not list(folder.glob("run.replaced-by-*"))


def refusal(config: DPOConfig) -> str | None:
    """Why a run was refused, in one line; None if it trained."""
    message = None
    try:
        train(config, console=QUIET)
    except UserError as error:
        message = str(error)
    assert "\n" not in (message or ""), message
    return message


@attack
def flipped_bit_in_a_run(rng: random.Random, folder: Path) -> None:
    """Whatever file it lies in, the run ends with the same bits, or names the file that cannot be trusted."""
    whole = whole_run(save_steps=3)
    shutil.copytree(whole / "run", folder / "run")
    shutil.copy(whole / "reference.sqlite", folder)
    shutil.rmtree(folder / "run" / "final")
    flip_a_bit(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())), rng)
    if refusal(make_config(folder, save_steps=3, resume="auto")) is None:
        assert_same_weights(folder / "run" / "final", whole / "run" / "final")


@attack
def flipped_bit_in_the_reference_store(rng: random.Random, folder: Path) -> None:
    """A fresh run trains as it would have without the damage, but for the rounding of a row that was scored again."""
    whole = whole_run()
    shutil.copy(whole / "reference.sqlite", folder)
    flip_a_bit(folder / "reference.sqlite", rng)
    if (message := refusal(make_config(folder))) is not None:
        assert "--reference_store" in message, message
        return
    losses = [
        [json.loads(line)["loss"] for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
        for run in (folder, whole)
    ]
    assert len(losses[0]) == len(losses[1])
    assert max(abs(ours - theirs) for ours, theirs in zip(*losses, strict=True)) < 1e-4
