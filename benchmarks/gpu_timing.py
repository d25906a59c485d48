"""Timing and errors for benchmarks that run on a GPU, or on a CPU as a trial."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BY_AUTOTUNE = "chosen by autotune"


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 12) -> dict[str, float]:
    """Median milliseconds; contestants take turns, and the first two rounds are discarded.

    On a GPU, times come from CUDA events, so the host only waits once, at the end.
    """
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            times[name].append(_timed(function))
    synchronize()
    return {name: statistics.median(ms() for ms in some[2:]) for name, some in times.items()}


def _timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Run a function; returns a function that gives its milliseconds once the device is done."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        return lambda: 1e3 * seconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    return lambda: first.elapsed_time(last)


def peak_mib(function: Callable[[], Any]) -> float | None:
    """Peak MiB beyond what was allocated before, including returned gradients. None on a CPU."""
    if DEVICE.type == "cpu":
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def head_ways() -> list[str]:
    """The kernels that the head can use here; a CPU only has PyTorch's."""
    return ["fused", "sliced", BY_AUTOTUNE] if DEVICE.type == "cuda" else ["torch"]


@contextmanager
def head_goes(way: str) -> Iterator[None]:
    """Make the head use one of `head_ways` inside the block, for scoring too."""
    if way == "torch":
        yield
        return
    from dpo_fast.kernels import linear_logprob_gpu

    ways = linear_logprob_gpu._variants

    def some(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = ways(*args, **kwargs)
        if way == BY_AUTOTUNE:
            return found
        # fp32 only has one.
        name = next((name for name in found if name.startswith(way)), next(iter(found)))
        return {name: found[name]}

    with mock.patch.object(linear_logprob_gpu, "_variants", some):
        yield
