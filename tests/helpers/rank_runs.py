"""Runs of several processes, started as torchrun does, but from processes that have imported everything."""

from __future__ import annotations

from multiprocessing.process import BaseProcess
from pathlib import Path

from small_runs import finish, start_train

from dpo_fast.config import DPOConfig
from dpo_fast.ranks import free_port


def start_ranks(
    config: DPOConfig,
    folder: Path,
    *,
    world_size: int = 2,
    slow: tuple[str, ...] = (),
    delay: float = 0.1,
    count: bool = False,
) -> list[BaseProcess]:
    """One process for each rank; their logs are `rank-K.log` in `folder`, with `count` the bytes in `bytes-K.json`."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    if count:
        common["COUNT_BYTES"] = str(folder)
    return [
        start_train(
            *(config, folder / f"rank-{rank}.log"),
            slow=slow,
            delay=delay,
            environment=common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        )
        for rank in range(world_size)
    ]


def finish_ranks(processes: list[BaseProcess], folder: Path) -> list[int]:
    """Their exit codes; none has ended by a traceback."""
    return [finish(process, folder / f"rank-{rank}.log") for rank, process in enumerate(processes)]


def train_on_ranks(config: DPOConfig, folder: Path, *, world_size: int = 2, count: bool = False) -> None:
    """Train with several processes, all of which succeed."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = finish_ranks(start_ranks(config, folder, world_size=world_size, count=count), folder)
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, logs
    assert "step" not in "".join(logs[1:]), f"only the first process prints, not: {logs[1:]}"
