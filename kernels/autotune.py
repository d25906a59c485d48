"""Choose among variants of a computation: check each, time the correct ones, and keep the choice on disk.

Variants differ only in rounding. A choice is made per GPU, versions, source of the kernels and sizes, so that a machine
which has chosen once gives the same bits from then on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("dpo_fast")

_ROUNDS = 5
_used: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Trial:
    """What a choice is based on.

    Attributes:
        variants: by name; functions that compute the same and may be called any number of times.
        is_right: overwrites their outputs, calls the one of that name, and compares with an independent truth.
    """

    variants: Mapping[str, Callable[[], object]]
    is_right: Callable[[str], bool]


def cache_dir() -> Path:
    """The user's cache folder of dpo-fast (`$XDG_CACHE_HOME/dpo-fast`, else `~/.cache/dpo-fast`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-fast"


def choose(key: str, names: Sequence[str], device: torch.device, make_trial: Callable[[], Trial | None]) -> str:
    """The name of the fastest correct variant for `key`; the first of `names` if nothing can or should be timed.

    Args:
        key: what the choice depends on besides GPU, versions and source, such as sizes and dtype.
        names: of the variants, the default first.
        device: where they run.
        make_trial: called only if a choice has to be made; returns None if these inputs cannot tell right from wrong,
            which takes the default this time.

    Raises:
        RuntimeError: no variant is correct on this GPU; the message says what each of them did.
    """
    if len(names) == 1 or not _can_time(device):
        return names[0]
    full_key = f"{_machine(device)}, {key}"
    if full_key not in _used:
        record = _valid(_read(), full_key, names)
        if record is None:
            trial = make_trial()
            if trial is None:
                return names[0]
            record = _keep(full_key, _choose(full_key, trial, device), names)
        _used[full_key] = record
    return str(_used[full_key]["choice"])


def choices() -> dict[str, dict[str, Any]]:
    """What this process has run with: by key the choice, milliseconds of each variant, and why others were left out."""
    return dict(_used)


def _can_time(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@cache
def _machine(device: torch.device) -> str:
    import torch
    import triton

    versions = f"CUDA {torch.version.cuda}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{torch.cuda.get_device_name(device)}, {versions}, kernels {_source_hash()}"


def _source_hash() -> str:
    """Eight digits that change with the kernels' source."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _valid(records: Mapping[str, dict[str, Any]], key: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The record of `key`, if it chose a variant that exists."""
    record = records.get(key)
    return record if record is not None and record.get("choice") in names else None


def _choose(key: str, trial: Trial, device: torch.device) -> dict[str, Any]:
    import torch

    right, left_out = {}, {}
    for name, variant in trial.variants.items():
        try:
            if trial.is_right(name):
                right[name] = variant
            else:
                left_out[name] = "wrong result"
        except torch.OutOfMemoryError:
            # The cause is what else is on the GPU, not this variant.
            raise
        except Exception as error:
            # Triton raises many types if a GPU has too little of something.
            left_out[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    for name, reason in left_out.items():
        logger.warning("autotune leaves %s out (%s): %s", name, key, reason)
    if not right:
        raise RuntimeError(
            f"no kernel gives the right result here ({key}): {left_out}. "
            'Please report it; backend="torch" of linear_logprob avoids them'
        )
    milliseconds = _milliseconds(right, device)
    choice = min(milliseconds, key=milliseconds.__getitem__)
    record: dict[str, Any] = {"choice": choice, "milliseconds": milliseconds}
    return {**record, "left out": left_out} if left_out else record


def _milliseconds(variants: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Medians over a few rounds in which the variants take turns; all are warm."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.cuda.device(device):
        for _ in range(_ROUNDS):
            for name, variant in variants.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                variant()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(some) for name, some in times.items()}


def _path() -> Path:
    return cache_dir() / "autotune.json"


def _read() -> dict[str, dict[str, Any]]:
    """What is on disk; a file that cannot be read only costs a few timings."""
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _keep(key: str, record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Write a choice; returns the one that holds: another process's if that came first."""
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        with _locked(_path().with_suffix(".lock")):
            records = _read()
            if earlier := _valid(records, key, names):
                return earlier
            staging = _path().with_suffix(f".{os.getpid()}")
            staging.write_text(json.dumps({**records, key: record}, indent=1, sort_keys=True) + "\n")
            staging.replace(_path())
    except OSError as error:
        logger.info("autotune: %s cannot be written (%s); choices will be made again next time", _path(), error)
    return record


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, except where files cannot be locked (Windows)."""
    with path.open("w") as file:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
