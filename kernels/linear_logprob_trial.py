"""Checks a variant's exponentials before `autotune.py` may choose it; see `linear_logprob_gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dpo_fast.kernels.autotune import Trial
from dpo_fast.kernels.head import Head
from dpo_fast.kernels.linear_logprob_torch import MAX_ODDS, column_tiles, exponentials_
from dpo_fast.kernels.token_stats import StatsSums

# Rows that are checked, and how far their exponentials and sums may be off: they carry bf16's 8 bits, and the products'
# fp32 roundings in the exponent.
CHECKED_ROWS = 8
CHECKED_ERROR = 2e-2


def make_trial(
    variants: Mapping[str, Callable[..., None]],
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    e: Tensor,
    *,
    want_stats: bool,
) -> Trial | None:
    """The variants on one block, and the truth about a few of its rows from plain PyTorch.

    Args:
        variants: functions that write exponentials and sums.
        head, hidden, target, anchor: of the block.
        e: (N, V) scratch for exponentials.
        want_stats: also check `StatsSums`.

    Returns:
        None if none of these rows could tell right from wrong.
    """
    vocab, odds = head.weight.shape[0], torch.empty_like(anchor)
    sums = StatsSums.zeros_like(odds) if want_stats else None
    calls = {name: partial(variant, head, hidden, target, anchor, odds, e, sums) for name, variant in variants.items()}
    rows = torch.linspace(0, len(hidden) - 1, min(CHECKED_ROWS, len(hidden)), device=hidden.device).long()
    true_e = torch.empty(len(rows), vocab, dtype=head.dtype, device=hidden.device)
    true_odds = torch.zeros_like(true_e[:, 0])
    true_sums = StatsSums.zeros_like(true_odds) if want_stats else None
    some_hidden, some_anchor, some_target = hidden[rows].to(head.dtype), anchor[rows], target[rows]
    for columns in column_tiles(head, len(rows)):
        tile = (true_e[:, columns], head, some_hidden, *head.tile(columns), some_anchor, some_target - columns.start)
        true_odds += exponentials_(*tile, true_sums)
    # Variants need not get rows out of range right, which are recomputed, nor rows that are not finite.
    near = (true_odds <= MAX_ODDS) & true_e.isfinite().all(1)
    if not near.any():
        return None
    places = rows[near]

    def is_right(name: str) -> bool:
        for x in (e, odds, *(sums or ())):
            x.fill_(-1)  # which no exponential is
        calls[name]()
        pairs = [(e[places].to(head.dtype), true_e[near]), (odds[places, None], true_odds[near, None])]
        if sums is not None and true_sums is not None:
            got, want = sums.rows(places), true_sums.rows(near)
            pairs += [(got.square[:, None], want.square[:, None]), (got.energy[:, None], want.energy[:, None])]
            # These may be near 0 in a single row, so all rows are compared as one.
            pairs.append((torch.cat([got.shifted, got.peak])[None], torch.cat([want.shifted, want.peak])[None]))
        # Of the other rows check that all is written, and that exponentials are finite if their sum is.
        unwritten = (e.amin(1) < 0) | (odds < 0)
        whole = e.sum(1, dtype=torch.float32).isfinite() | ~(odds <= MAX_ODDS)
        return all(_are_close(*pair) for pair in pairs) and bool(whole.all() and not unwritten.any())

    return Trial(calls, is_right)


def _are_close(got: Tensor, want: Tensor) -> bool:
    """Row by row: exponentials of one row may exceed all of another's by many orders of magnitude."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    got, want = got.where(finite, 0.0), want.where(finite, 0.0)
    return bool(((got - want).norm(dim=1) <= CHECKED_ERROR * want.norm(dim=1) + 1e-30).all())
