"""How many tokens a pack may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpo_fast.packs.layout import Group

# Beyond these a pack takes more memory and is hardly faster per token (docs/packing.md).
FULL_CPU = 2048
FULL_GPU = 8192
# What small GPUs get of it. Total memory, not what is free: a resumed run must cut its steps in the same way.
TOKENS_PER_GIB = 128


def token_budget(config: Any, groups: Sequence[Group], *, pairs: int, device: torch.device) -> int:
    """Token budget of a pack: `max_tokens_per_batch` if set, otherwise what keeps the device busy.

    Args:
        config: with `max_tokens_per_batch` and `max_length`.
        groups: all that are to be packed; the longest one always fits.
        pairs: a pack needs no more room than these pairs of full length.
        device: that computes the packs.
    """
    longest = max(group.num_tokens for group in groups)
    return budget_of(config, longest, pairs=pairs, full=full_pack(device))


def budget_of(config: Any, longest: int, *, pairs: int, full: int) -> int:
    """Token budget of a pack on a device that `full` tokens keep busy; `longest` is that of a group."""
    if config.max_tokens_per_batch is not None:
        return int(config.max_tokens_per_batch)
    room = pairs * (longest if config.max_length is None else 2 * config.max_length)
    return max(longest, min(room, full))


def full_pack(device: torch.device) -> int:
    """Tokens that keep a device busy, fewer if its memory is small."""
    return full_pack_of(torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)


def full_pack_of(gpu_memory: float | None) -> int:
    """Tokens that keep a GPU with that many bytes busy; None is a CPU."""
    return FULL_CPU if gpu_memory is None else min(FULL_GPU, TOKENS_PER_GIB * int(gpu_memory // 2**30))
