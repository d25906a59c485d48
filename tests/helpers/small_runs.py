"""Small training runs: their rows, their weights, and runs in processes of their own that tests interrupt and kill."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from oracle import SENTENCES
from rich.console import Console
from safetensors.torch import load_file

from dpo_fast.config import DPOConfig

QUIET = Console(quiet=True)
# Children are forked from a process that has imported everything and started no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["dpo_fast.cli", "dpo_fast.training.run", "transformers.models.llama.modeling_llama", "bitsandbytes"]
)


def write_rows(path: Path, *, num_rows: int = 14) -> str:
    """Rows of different lengths."""
    words = " ".join(SENTENCES).split()
    rows = [
        {
            "prompt": " ".join(words[i : i + 1 + i % 5]),
            "chosen": " " + " ".join(words[i + 5 : i + 7 + i % 3]),
            "rejected": " " + " ".join(words[i + 9 : i + 10 + i % 6]),
        }
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights in a model's folder."""
    return load_file(os.path.join(folder, "model.safetensors"))


def assert_same_weights(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> None:
    """Compare the weights in two folders to the bit."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def _run(
    words: list[str], log: str, slow: list[str], delay: float, terminal: str | None, environment: dict[str, str]
) -> None:
    if environment:
        os.environ.update(environment)
        torch.set_num_threads(1)
        if "COUNT_BYTES" in environment:
            _count_bytes(Path(environment["COUNT_BYTES"]) / f"bytes-{environment['RANK']}.json")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if terminal is not None:
        os.setsid()
        screen = os.open(terminal, os.O_RDWR)  # of a process without a terminal, it becomes its own
        os.dup2(screen, 0)
    else:
        screen = descriptor
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    for name in slow:
        _slow_down(name, delay, descriptor)
    try:
        from dpo_fast.cli import main

        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # while Python was importing
        code = 130
    # A signal that comes after the command must not meet multiprocessing's own clearing up.
    with suppress(KeyboardInterrupt):
        sys.stdout.flush()
    os._exit(code)


def _count_bytes(out: Path) -> None:
    """Write the bytes of what a process holds after its first step."""
    from torch.distributed.tensor import DTensor

    from dpo_fast.training.loop import Trainer

    step = Trainer.train_step

    def part(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    def counted(self: Trainer) -> torch.Tensor:
        weights = list(self.policy.model.parameters())
        drop = self.weights.drop_gradients
        found = {"weights": sum(map(part, weights)), "whole": sum(weight.nbytes for weight in weights)}

        def dropping() -> None:
            found["gradients"] = sum(part(weight.grad) for weight in weights if weight.grad is not None)
            drop()

        self.weights.drop_gradients = dropping
        norm = step(self)
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        found["state"] = sum(x.nbytes for x in states if torch.is_tensor(x) and x.ndim)
        out.write_text(json.dumps(found))
        return norm

    Trainer.train_step = counted


def _slow_down(name: str, delay: float, log: int) -> None:
    """Announce each call of `module:function` in a log, and wait before and after it."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    call = getattr(owner, last)

    def slowly(*args, **kwargs):
        os.write(log, f"begins {last}\n".encode())
        time.sleep(delay)
        result = call(*args, **kwargs)
        time.sleep(delay)
        return result

    setattr(owner, last, slowly)


def options(config: DPOConfig) -> list[str]:
    """The settings as words of the command line."""
    words = [f"--{name}={json.dumps(value)}" for name, value in vars(config).items() if value is not None]
    return [word.replace('="', "=").removesuffix('"') for word in words]


def start_train(
    config: DPOConfig,
    log: Path,
    *,
    slow: tuple[str, ...] = (),
    delay: float = 0.1,
    terminal: str | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """`dpo-fast train` in a process of its own, which prints into `log`.

    Args:
        config: the run.
        log: file to append to.
        slow: functions (`module:name`) to slow down; the log says `begins NAME` at each call.
        delay: seconds to wait before and after them.
        terminal: device that the process takes as its terminal; then the log holds only those calls.
        environment: what a launcher would tell the process.
    """
    words = ["train", *options(config)]
    log.touch()  # it may be killed before it begins
    process = CONTEXT.Process(target=_run, args=(words, str(log), list(slow), delay, terminal, environment or {}))
    process.start()
    return process


def wait_for(process: BaseProcess, log: Path, text: str, *, count: int = 1) -> None:
    """Return when the log of a process that runs holds `text` so often."""
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count(text) >= count):
        assert process.is_alive(), f"ended before {text!r}: {log.read_text() if log.exists() else ''}"
        assert time.monotonic() < deadline, f"no {text!r} in {log.read_text()}"
        time.sleep(0.005)


def finish(process: BaseProcess, log: Path) -> int:
    """The exit code of a process; its last words are one line if it failed, and never a traceback."""
    process.join(90)
    assert process.exitcode is not None, "did not end"
    assert "Traceback" not in log.read_text(), log.read_text()
    return process.exitcode
