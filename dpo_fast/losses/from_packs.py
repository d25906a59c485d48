"""Sums over the answers of a pack, pair by pair: the step from log-probs of tokens to what losses read."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast.kernels.gather_rows import RowIndex, gather_rows
from dpo_fast.kernels.segment_sum import segment_mean, segment_sum
from dpo_fast.losses.pairs import PairLogps
from dpo_fast.packs.layout import PackedBatch


def pair_logps(
    batch: PackedBatch, token_logps: Tensor, *, ld_alpha: float | None = None, log_sum_p2: Tensor | None = None
) -> PairLogps:
    """Sums over answers, pair by pair: the step from (N,) token log-probs to what losses read.

    Args:
        batch: without `ref_logps` the reference counts as 0, for losses that need none.
        token_logps: (N,) log-probs of the policy, differentiable.
        ld_alpha: factor of the longer answer's tokens beyond the shorter one's length: LD-DPO, Liu et al. 2024 (arXiv
            2409.06411), eq. 10; None is 1.
        log_sum_p2: (N,) log of the policy's Σ p² at each target: weights each pair as WPO does, Zhou et al. 2024 (arXiv
            2406.11827), eq. 2; None does not.
    """
    lengths = batch.answer_lengths
    bounds = batch.cu_answers
    sums = _PairSums(batch, ld_alpha)
    chosen, rejected = sums(token_logps)
    ref_chosen, ref_rejected = (torch.zeros_like(x) for x in (chosen, rejected))
    if batch.ref_logps is not None:
        ref_chosen, ref_rejected = sums(batch.ref_logps)
    weight = batch.weights
    if log_sum_p2 is not None:
        aligned = segment_mean(token_logps.detach() - log_sum_p2.detach(), bounds).exp()
        own = aligned[batch.chosen] * aligned[batch.rejected]
        weight = own if weight is None else weight * own
    gold = None if batch.gold is None else segment_sum(token_logps, bounds)[batch.gold]
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_len=lengths[batch.chosen],
        rejected_len=lengths[batch.rejected],
        weight=weight,
        score_gap=batch.score_gaps,
        gold=gold,
        gold_len=None if batch.gold is None else lengths[batch.gold],
    )


class _PairSums:
    """(P,) sums over the tokens of chosen and of rejected answers."""

    def __init__(self, batch: PackedBatch, ld_alpha: float | None) -> None:
        self.batch = batch
        self.ld_alpha = ld_alpha
        if ld_alpha is None or ld_alpha == 1:
            return
        # An answer may be in several pairs, with another part of it beyond the partner's length in each: its tokens are
        # laid out once per pair, and weighted there.
        sides = torch.cat([batch.chosen, batch.rejected])
        own = batch.answer_lengths[sides]
        shared = torch.minimum(*own.chunk(2)).repeat(2)
        self.bounds = torch.cat([own.new_zeros(1), own.cumsum(0)])
        numbers = torch.arange(len(sides), device=own.device)
        side = torch.repeat_interleave(numbers, own, output_size=batch.num_pair_tokens)
        place = torch.arange(len(side), device=own.device) - self.bounds[side]
        self.rows = RowIndex.of(batch.cu_answers[sides][side] + place, len(batch.targets))
        self.weights = torch.where(place < shared[side], 1.0, ld_alpha)

    def __call__(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        if self.ld_alpha is None or self.ld_alpha == 1:
            sums = segment_sum(token_logps, self.batch.cu_answers)
            return sums[self.batch.chosen], sums[self.batch.rejected]
        weighted = gather_rows(token_logps, self.rows) * self.weights.to(token_logps.dtype)
        chosen, rejected = segment_sum(weighted, self.bounds).chunk(2)
        return chosen, rejected
