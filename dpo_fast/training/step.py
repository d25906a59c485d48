"""What one pack adds to an optimizer step: its summed loss, its gradient, its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.losses.from_packs import pair_logps
from dpo_fast.losses.objective import needs_reference, preference_loss
from dpo_fast.losses.pairs import PairLogps
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


def pair_losses(
    batch: PackedBatch, scored: Scored, config: LossConfig, reward_shift: Tensor | None = None
) -> tuple[PairLogps, Tensor]:
    """The pairs of a scored pack and their losses (P,); `reward_shift` is that of `bco`."""
    assert batch.ref_logps is not None or not needs_reference(config), "this loss compares with a reference"
    log_sum_p2 = None if scored.stats is None or not config.use_weighting else scored.stats.sum_p2.log()
    pairs = pair_logps(batch, scored.logps, ld_alpha=config.ld_alpha, log_sum_p2=log_sum_p2)
    pairs = replace(pairs, reward_shift=reward_shift)
    return pairs, preference_loss(pairs, config)


def loss_and_metrics(
    policy: Policy, batch: PackedBatch, config: LossConfig, reward_shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A pack's summed loss, and its metrics as (len(PAIR_METRICS), P); `reward_shift` is that of `bco`."""
    batch = batch.to(policy.device)
    scored = policy.forward(batch, want_stats=config.use_weighting)
    pairs, losses = pair_losses(batch, scored, config, reward_shift)
    loss = losses.sum()
    if scored.router_loss is not None:
        # It is a mean over the pack's tokens, and counts as the pack's pairs do.
        loss = loss + batch.num_pairs * scored.router_loss
    return loss, pair_metrics(pairs, losses, config.beta)


def backward(
    policy: Policy, batch: PackedBatch, config: LossConfig, num_pairs: int, reward_shift: Tensor | None = None
) -> Tensor:
    """Add a pack's share of the gradient of the mean loss over a step of `num_pairs` pairs; returns its metrics."""
    loss, metrics = loss_and_metrics(policy, batch, config, reward_shift)
    (loss / num_pairs).backward()
    return metrics


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
