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
    if config.max_tokens_per_batch is not None:
        return int(config.max_tokens_per_batch)
    longest = max(group.num_tokens for group in groups)
    room = pairs * (longest if config.max_length is None else 2 * config.max_length)
    return max(longest, min(room, full_pack(device)))


def full_pack(device: torch.device) -> int:
    """Tokens that keep a device busy, fewer if its memory is small."""
    if device.type != "cuda":
        return FULL_CPU
    gib = torch.cuda.get_device_properties(device).total_memory // 2**30
    return min(FULL_GPU, TOKENS_PER_GIB * gib)
