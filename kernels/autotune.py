"""Choosing among a few ways to do the same by timing them once; the choice is kept on disk.

Ways differ in rounding alone. A choice is made per GPU, versions and sizes, so that a machine which has chosen once
gives the same bits from then on; `enabled = False` (`--autotune false`) always takes the default.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("dpo_fast")

enabled = True
_ROUNDS = 3
_chosen: dict[str, str] = {}


def cache_dir() -> Path:
    """The user's cache folder of dpo-fast (`$XDG_CACHE_HOME/dpo-fast`, else `~/.cache/dpo-fast`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-fast"


def choose(key: str, default: str, ways: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The name of the fastest of `ways` for `key`; `default` where nothing can or shall be timed.

    Args:
        key: what the choice depends on beside GPU and versions, such as sizes and dtype.
        default: one of the names.
        ways: functions that all do the same and may be called any number of times. One that fails to compile or to
            start is left out.
        device: where they run.
    """
    if not enabled or len(ways) == 1 or not _can_time(device):
        return default
    full_key = f"{_machine(device)}, {key}"
    if full_key not in _chosen:
        _chosen.update(_read())
    if _chosen.get(full_key) not in ways:
        _chosen[full_key] = _fastest(ways, default, device)
        _write({**_read(), full_key: _chosen[full_key]})
    return _chosen[full_key]


def _can_time(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@cache
def _machine(device: torch.device) -> str:
    import torch
    import triton

    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}"


def _fastest(ways: Mapping[str, Callable[[], object]], default: str, device: torch.device) -> str:
    milliseconds = {}
    for name, way in ways.items():
        try:
            milliseconds[name] = _milliseconds(way, device)
        except Exception as error:
            # Triton raises many types where a GPU has too little of something; the default is left to tell.
            logger.info("autotune leaves %s out: %s", name, error)
    logger.info("autotune: %s", ", ".join(f"{name} {ms:.3f} ms" for name, ms in milliseconds.items()))
    return min(milliseconds, key=milliseconds.__getitem__) if milliseconds else default


def _milliseconds(way: Callable[[], object], device: torch.device) -> float:
    """Median over a few calls, after one that compiles and warms up."""
    import torch

    way()
    with torch.cuda.device(device):
        times = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def _path() -> Path:
    return cache_dir() / "autotune.json"


def _read() -> dict[str, str]:
    """What is on disk; a file that cannot be read costs a few timings, no more."""
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _write(choices: Mapping[str, str]) -> None:
    staging = _path().with_suffix(f".{os.getpid()}")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(json.dumps(choices, indent=1, sort_keys=True) + "\n")
        staging.replace(_path())
    except OSError as error:
        logger.info("autotune: %s cannot be written (%s); choices are made anew next time", _path(), error)
