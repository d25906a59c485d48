"""What a preference loss reads: fp32 log-probs of whole answers, pair by pair, and the scores made of them.

Notation: pi is the policy, ref the frozen reference, w the chosen and l the rejected answer of a prompt x;
    r_w = log pi(w|x) - log ref(w|x),  r_l likewise          log-ratios in nats
    Δ = f'(e^r_w) - f'(e^r_l)                                the margin, before beta; r_w - r_l for the usual reverse KL

There are two margins: `PairLogps.margin` is r_w - r_l whatever the divergence, `divergence_margin` is Δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.config import LossConfig


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may read of P pairs.

    Attributes:
        chosen, rejected: (P,) fp32, log pi of the whole answer, in nats.
        ref_chosen, ref_rejected: (P,) fp32, log ref of the same answers.
        chosen_len, rejected_len: (P,) int64, scored tokens of each answer.
        weight: (P,) fp32 factor of each pair's loss; None is 1.
        score_gap: (P,) fp32, by how much the chosen answer's true score is higher; None where no score is known.
        gold, gold_len: (P,), log pi and length of a third answer, better than both; None where rows have none.
        reward_shift: scalar, mean of beta r over both answers of all earlier steps; None is 0.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    weight: Tensor | None = None
    score_gap: Tensor | None = None
    gold: Tensor | None = None
    gold_len: Tensor | None = None
    reward_shift: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """(P,) log pi(w|x) - log ref(w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """(P,) log pi(l|x) - log ref(l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """(P,) log pi(w|x) / |w|, nats a token."""
        return self.chosen / self.chosen_len.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """(P,) log pi(l|x) / |l|, nats a token."""
        return self.rejected / self.rejected_len.clamp(min=1)

    @property
    def margin(self) -> Tensor:
        """(P,) r_w - r_l."""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.chosen.shape[0]

    def to(self, device: torch.device | str) -> PairLogps:
        """The pairs on another device, without a gradient."""
        moved = {name: x.detach().to(device) for name in PER_PAIR if (x := getattr(self, name)) is not None}
        return replace(self, **moved)

    @staticmethod
    def join(parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of several packs as those of one."""

        def joined(values: list[Tensor | None]) -> Tensor | None:
            known = [value for value in values if value is not None]
            return torch.cat(known) if len(known) == len(values) else None

        columns = {name: joined([getattr(part, name) for part in parts]) for name in PER_PAIR}
        if any(part.weight is not None for part in parts):
            columns["weight"] = torch.cat(
                [torch.ones_like(part.chosen) if part.weight is None else part.weight for part in parts]
            )
        return PairLogps(**columns, reward_shift=parts[0].reward_shift)  # type: ignore[arg-type]

    def take(self, index: Tensor) -> PairLogps:
        """Some of the pairs, in the order of `index`."""
        taken = {name: x[index] for name in PER_PAIR if (x := getattr(self, name)) is not None}
        return replace(self, **taken)

    def at_reference(self) -> PairLogps:
        """The same pairs with the policy equal to the reference: every margin is 0."""
        return replace(self, chosen=self.ref_chosen, rejected=self.ref_rejected)


PER_PAIR = tuple(field.name for field in fields(PairLogps) if field.name != "reward_shift")
# Those with a gradient.
OF_POLICY = ("chosen", "rejected", "gold")

# e^64 leaves room in fp32 for products and differences of such numbers.
EXPM1_LIMIT = 64.0


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, continued by its tangent beyond 64: finite in fp32, with a gradient that keeps its sign."""
    return torch.expm1(x.clamp(max=EXPM1_LIMIT)) + math.exp(EXPM1_LIMIT) * F.relu(x - EXPM1_LIMIT)


Divergence = Callable[[Tensor, LossConfig], Tensor]


def _alpha_score(logratio: Tensor, config: LossConfig) -> Tensor:
    exponent = config.f_alpha_divergence_coef - 1
    if abs(exponent) < 1e-6:
        return logratio
    return expm1(exponent * logratio) / exponent


# f'(t) of the divergence that holds the policy near the reference, as a function of log t, with f'(1) = 0, so that a
# score over its length is 0 at the reference, too. f-DPO, Wang et al. 2023 (arXiv 2309.16240), table 1.
DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": lambda logratio, config: logratio,
    "forward_kl": lambda logratio, config: -expm1(-logratio),
    "js_divergence": lambda logratio, config: math.log(2) + F.logsigmoid(logratio),
    "alpha_divergence": _alpha_score,
}


def divergence_scores(pairs: PairLogps, config: LossConfig) -> tuple[Tensor, Tensor]:
    """f'(e^r_w) and f'(e^r_l), (P,) each, of the configuration's divergence."""
    score = DIVERGENCES[config.f_divergence_type]
    return score(pairs.chosen_logratio, config), score(pairs.rejected_logratio, config)


def divergence_margin(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(P,) Δ."""
    chosen, rejected = divergence_scores(pairs, config)
    return chosen - rejected


def mean_divergence_margin(pairs: PairLogps, config: LossConfig) -> Tensor:
    """Δ with each score divided by its answer's length."""
    chosen, rejected = divergence_scores(pairs, config)
    return chosen / pairs.chosen_len.clamp(min=1) - rejected / pairs.rejected_len.clamp(min=1)
