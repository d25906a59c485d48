"""TRL's figures of a micro-batch, kept on the device until a report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_fast.kernels.segment_sum import segment_sum
from dpo_fast.losses.pairs import PairLogps
from dpo_fast.model.policy import Scored
from dpo_fast.packs.layout import PackedBatch
from dpo_fast.training.metrics import TRL_METRICS, pair_metrics

# The loss is left out: transformers reports its own.
_OF_PAIRS = TRL_METRICS[1:]
_OF_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
NAMES = (*_OF_PAIRS, *_OF_TOKENS, "aux_loss")


@torch.no_grad()
def micro_batch_figures(
    batch: PackedBatch, pairs: PairLogps, losses: Tensor, scored: Scored, *, beta: float, router_loss_coef: float
) -> Tensor:
    """(2, len(NAMES)) fp32 on the device: sums and what to divide them by, zeros for a figure that there is none of."""
    stats = scored.stats
    assert stats is not None, "the head was not asked for its figures"
    entropy, mean_logit, hits = (
        segment_sum(x.float(), batch.cu_answers) for x in (stats.entropy, stats.mean_logit, stats.is_argmax)
    )
    lengths = batch.answer_lengths
    num_chosen, num_rejected = lengths[batch.chosen].sum(), lengths[batch.rejected].sum()
    num_pairs = torch.full_like(num_chosen, batch.num_pairs)
    sums = [
        *pair_metrics(pairs, losses, beta)[1 : len(TRL_METRICS)].sum(1),
        *(entropy.sum(), mean_logit[batch.chosen].sum(), mean_logit[batch.rejected].sum(), hits[batch.chosen].sum()),
        torch.zeros_like(losses[0]) if scored.router_loss is None else scored.router_loss / router_loss_coef,
    ]
    counts = [
        *[num_pairs] * len(_OF_PAIRS),
        *(lengths.sum(), num_chosen, num_rejected, num_chosen),
        torch.full_like(num_chosen, scored.router_loss is not None),
    ]
    return torch.stack([torch.stack(sums), torch.stack(counts).float()])


def num_unshared_tokens(batch: PackedBatch) -> int:
    """Tokens as TRL counts them, with a copy of the prompt for each answer; the bounds are known on the host."""
    return int(batch.cu_seqlens_k.diff()[list(batch.answer_segments)].sum())


class FigureWindow:
    """Figures since the last report."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def add(self, block: Tensor) -> None:
        """Add a block of `micro_batch_figures`."""
        self._blocks.append(block)

    def read(
        self, reduce: Callable[[Tensor], Tensor], num_tokens: int, *, by_micro_batch: bool = False
    ) -> dict[str, float]:
        """Means over pairs and tokens, and `num_tokens` summed over all processes; empty if no block was added.

        Args:
            reduce: sums a tensor over all processes. This is the only wait for the device.
            num_tokens: of this process.
            by_micro_batch: average figures of tokens within micro-batches and then over them, as TRL does in training.
        """
        if not self._blocks:
            return {}
        blocks = torch.stack(self._blocks).double()
        self._blocks.clear()
        counted = reduce(torch.cat([blocks, blocks.new_full((len(blocks), 2, 1), num_tokens)], 2))
        sums, counts = counted.unbind(1)
        means = sums.sum(0) / counts.sum(0).clamp(min=1)
        if by_micro_batch:
            of_tokens = slice(len(_OF_PAIRS), len(_OF_PAIRS) + len(_OF_TOKENS))
            means[of_tokens] = (sums / counts.clamp(min=1)).mean(0)[of_tokens]
        values, are_there = torch.stack([means, counts[0]]).tolist()
        figures = {name: value for name, value, there in zip(NAMES, values, are_there, strict=False) if there}
        return figures | {"num_tokens": are_there[-1]}
