"""How many tokens a pack may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Group


def token_budget(config: Any, groups: Sequence[Group], pairs: int) -> int:
    """Token budget of a pack: `max_tokens_per_batch` if set, otherwise room for `pairs` pairs of full length."""
    if config.max_tokens_per_batch is not None:
        if config.max_tokens_per_batch < 1:
            raise UserError(f"--max_tokens_per_batch {config.max_tokens_per_batch}: expected a number above 0")
        return int(config.max_tokens_per_batch)
    longest = max(group.num_tokens for group in groups)
    return pairs * (longest if config.max_length is None else 2 * config.max_length)
