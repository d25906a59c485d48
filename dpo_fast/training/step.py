"""The loss of an optimizer step, its gradient and its metrics, pack by pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.losses.from_packs import pair_logps
from dpo_fast.losses.objective import any_loss, needs_reference, preference_loss
from dpo_fast.losses.pairs import OF_POLICY, PairLogps
from dpo_fast.model.policy import Policy, Scored
from dpo_fast.model.scorer import Scorer
from dpo_fast.packs.layout import Group, PackedBatch, pack
from dpo_fast.training.metrics import pair_metrics


@dataclass(frozen=True)
class PairSet:
    """Groups, with what gives their answers' log-probs under the reference; None if the loss needs none."""

    groups: list[Group]
    reference: Scorer | None = None

    def pack(self, indices: Sequence[int]) -> PackedBatch:
        """The pack of these groups, with its reference log-probs."""
        batch = pack([self.groups[i] for i in indices])
        return batch if self.reference is None else replace(batch, ref_logps=self.reference.score(batch))


def scored_pairs(
    batch: PackedBatch, scored: Scored, config: LossConfig, reward_shift: Tensor | None = None
) -> PairLogps:
    """What losses read of a scored pack; `reward_shift` is that of `bco`."""
    assert batch.ref_logps is not None or not needs_reference(config), "this loss compares with a reference"
    log_sum_p2 = None if scored.stats is None or not config.use_weighting else scored.stats.sum_p2.log()
    pairs = pair_logps(batch, scored.logps, ld_alpha=config.ld_alpha, log_sum_p2=log_sum_p2)
    return replace(pairs, reward_shift=reward_shift)


@dataclass(frozen=True)
class StepLoss:
    """The loss of an optimizer step, a mean over its pairs, and its gradient, pack by pack.

    Attributes:
        policy: to train.
        config: of the loss.
        reward_shift: of `bco`.
    """

    policy: Policy
    config: LossConfig
    reward_shift: Tensor | None = None

    def backward(self, batches: Iterable[PackedBatch], num_pairs: int) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Add the gradient of the mean loss over the step's `num_pairs` pairs.

        A loss of single pairs takes the packs as they come. One that compares the pairs of a step takes the sums of all
        packs first, then the gradient of each pack with the coefficients that came out; every pack but one is computed
        twice forward for it, and what is held at a time is still one pack's.

        Yields:
            Each pack and its metrics, (len(PAIR_METRICS), P).
        """
        if any_loss(self.config, lambda facts: facts.compares_pairs):
            yield from self._backward_together(list(batches), num_pairs)
            return
        for batch in batches:
            pairs, router_loss = self._forward(batch)
            losses = preference_loss(pairs, self.config)
            (_with_router(losses.sum(), router_loss, batch) / num_pairs).backward()
            yield batch, pair_metrics(pairs, losses, self.config.beta)

    def _backward_together(self, batches: list[PackedBatch], num_pairs: int) -> Iterator[tuple[PackedBatch, Tensor]]:
        *others, last = batches
        with torch.no_grad():
            parts = [self._forward(batch)[0] for batch in others]
        leaves = [
            {name: x.requires_grad_() for name in OF_POLICY if (x := getattr(part, name)) is not None} for part in parts
        ]
        pairs, router_loss = self._forward(last)
        losses = preference_loss(PairLogps.join([*parts, pairs]), self.config)
        (_with_router(losses.sum(), router_loss, last) / num_pairs).backward()
        parts.append(pairs)
        for batch, coefficients in zip(others, leaves, strict=True):
            own, router_loss = self._forward(batch)
            terms = [
                (leaf.grad * getattr(own, name)).sum() for name, leaf in coefficients.items() if leaf.grad is not None
            ]
            router = _with_router(torch.zeros_like(losses[0]), router_loss, batch) / num_pairs
            (torch.stack(terms).sum() + router).backward()
        counts = [batch.num_pairs for batch in batches]
        for batch, part, own_losses in zip(batches, parts, losses.detach().split(counts), strict=True):
            yield batch, pair_metrics(part, own_losses, self.config.beta)

    @torch.no_grad()
    def metrics(self, batches: Iterable[PackedBatch]) -> Iterator[Tensor]:
        """(len(PAIR_METRICS), P) of each pack, without a gradient; a loss that compares pairs compares all of them."""
        parts: Iterable[PairLogps] = (self._forward(batch)[0] for batch in batches)
        if any_loss(self.config, lambda facts: facts.compares_pairs):
            parts = [PairLogps.join(list(parts))]
        for pairs in parts:
            yield pair_metrics(pairs, preference_loss(pairs, self.config), self.config.beta)

    def _forward(self, batch: PackedBatch) -> tuple[PairLogps, Tensor | None]:
        """The pairs of a pack, and the router's loss of a mixture of experts."""
        batch = batch.to(self.policy.device)
        scored = self.policy.forward(batch, want_stats=self.config.use_weighting)
        return scored_pairs(batch, scored, self.config, self.reward_shift), scored.router_loss


def _with_router(loss: Tensor, router_loss: Tensor | None, batch: PackedBatch) -> Tensor:
    """The router's loss is a mean over the pack's tokens, and counts as the pack's pairs do."""
    return loss if router_loss is None else loss + batch.num_pairs * router_loss


class RewardShift:
    """The mean reward over all pairs of earlier steps, of chosen and rejected answers; stays on the device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._num_pairs = 0

    @property
    def value(self) -> Tensor | None:
        """Scalar fp32; None before the first step."""
        return None if self._sum is None else (self._sum / (2 * self._num_pairs)).float()

    def add(self, rewards: Tensor, num_pairs: int) -> None:
        """Count a step: `rewards` is the fp64 sum over its pairs of both answers' rewards."""
        self._sum = rewards if self._sum is None else self._sum + rewards
        self._num_pairs += num_pairs

    def state_dict(self) -> dict[str, Any]:
        """Sum and count."""
        return {"sum": self._sum, "num_pairs": self._num_pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self._sum, self._num_pairs = state["sum"], state["num_pairs"]
