"""Every preference loss: small pure functions of fp32 sequence log-probs, in one dict.

Notation: pi is the policy, ref the frozen reference, w the chosen and l the rejected answer of a prompt x;
    Δ = [log pi(w|x) - log ref(w|x)] - [log pi(l|x) - log ref(l|x)]        the margin in nats, before beta.
Each function takes `PairLogps` and returns one loss per pair, (P,) fp32, not yet averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may read of P pairs.

    Attributes:
        chosen, rejected: (P,) fp32, log pi of the whole answer, in nats.
        ref_chosen, ref_rejected: (P,) fp32, log ref of the same answers.
        chosen_len, rejected_len: (P,) int64, scored tokens of each answer.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    @property
    def chosen_logratio(self) -> Tensor:
        """(P,) log pi(w|x) - log ref(w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """(P,) log pi(l|x) - log ref(l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) Δ."""
        return self.chosen_logratio - self.rejected_logratio

    def at_reference(self) -> PairLogps:
        """The same pairs with the policy equal to the reference: every margin is 0."""
        return replace(self, chosen=self.ref_chosen, rejected=self.ref_rejected)


Loss = Callable[[PairLogps, float, float], Tensor]


def sigmoid(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta Δ). DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. No label smoothing: see `cdpo`."""
    return -F.logsigmoid(beta * pairs.margin)


def cdpo(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - ε) log sigmoid(beta Δ) - ε log sigmoid(-beta Δ), ε = `label_smoothing`.

    Conservative DPO, Mitchell 2023 ("A note on DPO with noisy preferences", eq. 3).
    """
    logits = beta * pairs.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """[-(1 - ε) log sigmoid(beta Δ) + ε log sigmoid(-beta Δ)] / (1 - 2ε), ε = `label_smoothing` below 1/2.

    rDPO, unbiased where a share ε of the labels is flipped. Chowdhury et al. 2024 (arXiv 2403.00409), eq. 8.
    """
    logits = beta * pairs.margin
    noisy = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return noisy / (1 - 2 * label_smoothing)


def hinge(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta Δ). RSO, Liu et al. 2023 (arXiv 2309.06657), section 3.3."""
    return F.relu(1 - beta * pairs.margin)


def ipo(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """(Δ̄ - 1/(2 beta))², Δ̄ the margin with each log-ratio divided by its answer's length.

    IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; beta is the paper's τ. The mean over tokens is TRL's
    convention; the paper sums.
    """
    chosen = pairs.chosen_logratio / pairs.chosen_len.clamp(min=1)
    rejected = pairs.rejected_logratio / pairs.rejected_len.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
}
