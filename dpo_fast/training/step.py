"""The loss of an optimizer step, its gradient and its metrics, pack by pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.losses.from_packs import pair_logps
from dpo_fast.losses.objective import any_loss, needs_reference, preference_loss
from dpo_fast.losses.pairs import OF_POLICY, PairLogps
from dpo_fast.model.policy import Policy, Scored
from dpo_fast.model.scorer import Scorer
from dpo_fast.packs.layout import Group, PackedBatch, pack
from dpo_fast.ranks import ONE_PROCESS, Ranks
from dpo_fast.training.metrics import pair_metrics

Thing = TypeVar("Thing")


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

    Several processes go through their packs in lockstep; one that has fewer computes `filler` for nothing.

    Attributes:
        policy: to train.
        config: of the loss.
        reward_shift: of `bco`.
        ranks: the processes that share a step.
        filler: any pack.
    """

    policy: Policy
    config: LossConfig
    reward_shift: Tensor | None = None
    ranks: Ranks = ONE_PROCESS
    filler: PackedBatch | None = None

    def backward(self, batches: Iterable[PackedBatch | None], num_pairs: int) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Add the gradient of the mean loss over the step's `num_pairs` pairs, those of all processes.

        A loss of single pairs takes the packs as they come. One that compares the pairs of a step takes the sums of all
        packs first, then the gradient of each pack with the coefficients that came out; every pack but one is computed
        twice forward for it, and what is held at a time is still one pack's.

        Yields:
            Each pack of this process and its metrics, (len(PAIR_METRICS), P).
        """
        # Gradients are averaged over processes, where their sum is wanted.
        share = num_pairs / self.ranks.world_size
        if any_loss(self.config, lambda facts: facts.compares_pairs):
            yield from self._backward_together(list(batches), share)
            return
        for batch, is_last in _with_last(batches):
            self.policy.sum_gradients(now=is_last)
            pairs, rest = self._forward(batch)
            if batch is None or pairs is None:
                (rest / share).backward()
                continue
            losses = preference_loss(pairs, self.config)
            ((losses.sum() + rest) / share).backward()
            yield batch, pair_metrics(pairs, losses, self.config.beta)

    def _backward_together(
        self, batches: list[PackedBatch | None], share: float
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        *others, last = batches
        with torch.no_grad():
            before = [self._forward(batch)[0] for batch in others]
        leaves = [_leaves(part) for part in before]
        pairs, rest = self._forward(last)
        own = [part for part in (*before, pairs) if part is not None]
        losses = self._losses_together(own, [batch for batch in batches if batch is not None])
        self.policy.sum_gradients(now=not others)
        ((losses.sum() + rest) / share).backward()
        for (batch, is_last), coefficients in zip(_with_last(others), leaves, strict=True):
            self.policy.sum_gradients(now=is_last)
            again, rest = self._forward(batch)
            gradients = {name: leaf.grad for name, leaf in coefficients.items() if leaf.grad is not None}
            terms = [(gradient * getattr(again, name)).sum() for name, gradient in gradients.items()]
            torch.stack([*terms, rest / share]).sum().backward()
        own_losses = losses.detach().split(_counts(own, len(losses)))
        for batch, part, of_part in zip(filter(None, batches), own, own_losses, strict=False):
            yield batch, pair_metrics(part, of_part, self.config.beta)

    @torch.no_grad()
    def metrics(self, batches: Iterable[PackedBatch | None]) -> Iterator[Tensor]:
        """(len(PAIR_METRICS), P) of each pack of this process, without a gradient.

        A loss that compares pairs compares those of all packs of all processes.
        """
        if not any_loss(self.config, lambda facts: facts.compares_pairs):
            for batch in batches:
                if (pairs := self._forward(batch)[0]) is not None:
                    yield pair_metrics(pairs, preference_loss(pairs, self.config), self.config.beta)
            return
        batches = list(batches)
        parts = [part for batch in batches if (part := self._forward(batch)[0]) is not None]
        losses = self._losses_together(parts, [batch for batch in batches if batch is not None])
        for pairs, of_part in zip(parts, losses.split(_counts(parts, len(losses))), strict=False):
            yield pair_metrics(pairs, of_part, self.config.beta)

    def _losses_together(self, own: list[PairLogps], batches: list[PackedBatch]) -> Tensor:
        """Losses of this process's pairs, then of those of the others, each compared with all.

        They are compared in the order of their rows, since a loss may depend on it where log-ratios tie, as all do at
        the first step: how the step is cut into packs and processes must not show.
        """
        rows = [row for batch in batches for row in batch.pair_rows]
        others, their_rows = self._of_others(own, rows)
        order = torch.tensor([*rows, *their_rows]).argsort(stable=True).to(self.policy.device)
        losses = preference_loss(PairLogps.join([*own, *others]).take(order), self.config)
        return losses[order.argsort()]

    def _of_others(self, own: list[PairLogps], rows: list[int]) -> tuple[list[PairLogps], list[int]]:
        """The pairs of the other processes, without a gradient, and their rows."""
        if self.ranks.world_size == 1:
            return [], []
        found = self.ranks.gather(([replace(part, reward_shift=None).to("cpu") for part in own], rows))
        found = found[: self.ranks.rank] + found[self.ranks.rank + 1 :]
        others = [part.to(self.policy.device) for parts, _ in found for part in parts]
        their_rows = [row for _, rows in found for row in rows]
        return [replace(part, reward_shift=self.reward_shift) for part in others], their_rows

    def _forward(self, batch: PackedBatch | None) -> tuple[PairLogps | None, Tensor]:
        """The pairs of a pack, and what is to be added to their loss."""
        if batch is None:
            assert self.filler is not None, "an empty pack without a filler"
            return None, 0.0 * self.policy.forward(self.filler.to(self.policy.device)).logps.sum()
        batch = batch.to(self.policy.device)
        scored = self.policy.forward(batch, want_stats=self.config.use_weighting)
        pairs = scored_pairs(batch, scored, self.config, self.reward_shift)
        if scored.router_loss is None:
            return pairs, scored.logps.new_zeros(())
        # It is a mean over the pack's tokens, and counts as the pack's pairs do.
        return pairs, batch.num_pairs * scored.router_loss


def _with_last(things: Iterable[Thing]) -> Iterator[tuple[Thing, bool]]:
    """Each thing, and whether it is the last one."""
    remaining = iter(things)
    for thing in remaining:
        for following in remaining:
            yield thing, False
            thing = following
        yield thing, True


def _counts(parts: list[PairLogps], total: int) -> list[int]:
    """Pairs of each part, and of what follows them."""
    counts = [part.num_pairs for part in parts]
    return [*counts, total - sum(counts)]


def _leaves(pairs: PairLogps | None) -> dict[str, Tensor]:
    """What a loss may have a gradient in."""
    if pairs is None:
        return {}
    return {name: x.requires_grad_() for name in OF_POLICY if (x := getattr(pairs, name)) is not None}


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
