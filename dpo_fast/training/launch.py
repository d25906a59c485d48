"""`train --nproc K`: K processes on this machine, by torch's own starter of processes."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from dpo_fast.config import DPOConfig
from dpo_fast.errors import RUN_FAILED, STOPPED
from dpo_fast.machine import available_cores
from dpo_fast.ranks import free_port, launched
from dpo_fast.training.signals import handled_signals


def needs_launch(config: DPOConfig) -> bool:
    """Whether this process is to start those that train, and is none of them."""
    return config.nproc > 1 and launched() == 1


def launch(config: DPOConfig) -> int:
    """Run `train` in `config.nproc` processes; returns the exit code: that of the first one that did not end with 0.

    SIGTERM, SIGINT and SIGHUP are passed on to all of them. If one dies, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    # It would print a table of exit codes in place of the one line that the failed process has printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "train.yaml"
        settings.write_text(yaml.safe_dump(asdict(config) | {"nproc": 1}))
        words = ("-m", "dpo_fast", "train", "--config", str(settings))
        ranks = range(config.nproc)
        processes = start_processes(
            name="dpo-fast",
            entrypoint=sys.executable,
            args=dict.fromkeys(ranks, words),
            envs=_environments(config.nproc),
            logs_specs=DefaultLogsSpecs(),
        )

        def pass_on(number: int, frame: object) -> None:
            for pid in processes.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        with handled_signals(pass_on):
            result = processes.wait()
    if result is None or not result.is_failed():
        return 0
    codes = [failure.exitcode for failure in result.failures.values()]
    # By the time that the first is seen to have ended, others may have been killed for it.
    return next((code for code in (STOPPED, *codes) if code in codes and code > 0), RUN_FAILED)


def _environments(nproc: int) -> dict[int, dict[str, str]]:
    """What torchrun tells each process."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(nproc))
    # Each process would otherwise take all cores for its products on the CPU.
    common |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // nproc)))}
    return {rank: common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(nproc)}
