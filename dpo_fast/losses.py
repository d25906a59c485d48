"""Every preference loss: small pure functions of fp32 sequence log-probs, in one dict.

Notation: pi is the policy, ref the frozen reference, w the chosen and l the rejected answer of a prompt x;
    r_w = log pi(w|x) - log ref(w|x),  r_l likewise          log-ratios in nats
    Δ = f'(e^r_w) - f'(e^r_l)                                the margin, before beta; r_w - r_l for the usual reverse KL
Each function takes `PairLogps` and `LossConfig` and returns one loss per pair, (P,) fp32, not yet averaged;
`preference_loss` adds up those that a configuration names. Labels and names are TRL's; docs/losses.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.config import LossConfig, UserError


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


Loss = Callable[[PairLogps, LossConfig], Tensor]
Divergence = Callable[[Tensor, LossConfig], Tensor]


def _alpha_score(logratio: Tensor, config: LossConfig) -> Tensor:
    exponent = config.f_alpha_divergence_coef - 1
    if abs(exponent) < 1e-6:
        return logratio
    # e^80 is near the end of fp32; beyond it the gradient would be no number.
    return torch.expm1((exponent * logratio).clamp(max=80.0)) / exponent


# f'(t) of the divergence that holds the policy near the reference, as a function of log t, with f'(1) = 0, so that a
# score over its length is 0 at the reference, too. f-DPO, Wang et al. 2023 (arXiv 2309.16240), table 1.
DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": lambda logratio, config: logratio,
    "forward_kl": lambda logratio, config: -torch.expm1(-logratio),
    "js_divergence": lambda logratio, config: math.log(2) + F.logsigmoid(logratio),
    "alpha_divergence": _alpha_score,
}


def _scores(pairs: PairLogps, config: LossConfig) -> tuple[Tensor, Tensor]:
    score = DIVERGENCES[config.f_divergence_type]
    return score(pairs.chosen_logratio, config), score(pairs.rejected_logratio, config)


def _margin(pairs: PairLogps, config: LossConfig) -> Tensor:
    chosen, rejected = _scores(pairs, config)
    return chosen - rejected


def _mean_margin(pairs: PairLogps, config: LossConfig) -> Tensor:
    """Δ with each score divided by its answer's length."""
    chosen, rejected = _scores(pairs, config)
    return chosen / pairs.chosen_len.clamp(min=1) - rejected / pairs.rejected_len.clamp(min=1)


def sigmoid(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Δ). DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. No label smoothing: see `cdpo`."""
    return -F.logsigmoid(config.beta * _margin(pairs, config))


def cdpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-(1 - ε) log sigmoid(beta Δ) - ε log sigmoid(-beta Δ), ε = `label_smoothing`.

    Conservative DPO, Mitchell 2023 ("A note on DPO with noisy preferences", eq. 3).
    """
    logits, smoothing = config.beta * _margin(pairs, config), config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def robust(pairs: PairLogps, config: LossConfig) -> Tensor:
    """[-(1 - ε) log sigmoid(beta Δ) + ε log sigmoid(-beta Δ)] / (1 - 2ε), ε = `label_smoothing` below 1/2.

    rDPO, unbiased where a share ε of the labels is flipped. Chowdhury et al. 2024 (arXiv 2403.00409), eq. 8.
    """
    logits, smoothing = config.beta * _margin(pairs, config), config.label_smoothing
    noisy = -(1 - smoothing) * F.logsigmoid(logits) + smoothing * F.logsigmoid(-logits)
    return noisy / (1 - 2 * smoothing)


def hinge(pairs: PairLogps, config: LossConfig) -> Tensor:
    """max(0, 1 - beta Δ). RSO, Liu et al. 2023 (arXiv 2309.06657), section 3.3."""
    return F.relu(1 - config.beta * _margin(pairs, config))


def ipo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(Δ̄ - 1/(2 beta))², Δ̄ the margin with each score divided by its answer's length.

    IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; beta is the paper's τ. The mean over tokens is TRL's
    convention; `ipo_sum` is the paper's.
    """
    return (_mean_margin(pairs, config) - 1 / (2 * config.beta)) ** 2


def ipo_sum(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(Δ - 1/(2 beta))². IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17 to the letter: sums over tokens."""
    return (_margin(pairs, config) - 1 / (2 * config.beta)) ** 2


def sigmoid_norm(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Δ̄), Δ̄ as in `ipo`: length-normalised DPO, as in Tulu 3 (arXiv 2411.15124), section 5."""
    return -F.logsigmoid(config.beta * _mean_margin(pairs, config))


def exo_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """KL(q || p), q = (sigmoid(beta Δ), sigmoid(-beta Δ)), p = (1 - ε, ε), ε = `label_smoothing` above 0.

    EXO, Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """
    logits, smoothing = config.beta * _margin(pairs, config), config.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


def nca_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta r_w) - ½ log sigmoid(-beta r_w) - ½ log sigmoid(-beta r_l).

    NCA, Chen et al. 2024 (arXiv 2402.05369), the preference form of algorithm 1.
    """
    chosen, rejected = config.beta * pairs.chosen_logratio, config.beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l).

    BCO, Jung et al. 2024 (arXiv 2404.04656), eq. 8, with the reward shift δ at 0, as TRL has it.
    """
    return -F.logsigmoid(config.beta * pairs.chosen_logratio) - F.logsigmoid(-config.beta * pairs.rejected_logratio)


def sppo_hard(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(r_w - 1/(2 beta))² + (r_l + 1/(2 beta))². SPPO, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P in {0, 1}."""
    target = 0.5 / config.beta
    return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2


def apo_zero(pairs: PairLogps, config: LossConfig) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l), for chosen answers better than the model's own.

    APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    return torch.sigmoid(-config.beta * pairs.chosen_logratio) + torch.sigmoid(config.beta * pairs.rejected_logratio)


def apo_down(pairs: PairLogps, config: LossConfig) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)), for chosen answers worse than the model's own.

    APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    return torch.sigmoid(config.beta * pairs.chosen_logratio) + torch.sigmoid(-config.beta * pairs.margin)


def discopop(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(1 - m) log(1 + e^-x) + m e^-x, x = beta Δ, m = sigmoid(x / `discopop_tau`).

    DiscoPOP's log-ratio modulated loss, Lu et al. 2024 (arXiv 2406.08414), eq. 5.
    """
    logits = config.beta * _margin(pairs, config)
    modulation = torch.sigmoid(logits / config.discopop_tau)
    return -F.logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation


def dpop(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (Δ - λ max(0, -r_w))), λ = `dpop_lambda`: DPO that keeps the chosen from falling.

    DPO-Positive, Pal et al. 2024 (arXiv 2402.13228), eq. 3.
    """
    penalty = config.dpop_lambda * F.relu(-pairs.chosen_logratio)
    return -F.logsigmoid(config.beta * (_margin(pairs, config) - penalty))


def sft(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log pi(w|x) / |w|: the chosen answer's cross-entropy, to be added to another loss by `loss_weights`.

    The second term of RPO, Pang et al. 2024 (arXiv 2404.19733), eq. 1. Each answer counts alike; TRL averages over all
    chosen tokens of a batch, so that long answers count more.
    """
    return -pairs.chosen / pairs.chosen_len.clamp(min=1)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, cdpo, robust, hinge, ipo, ipo_sum, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard),
        *(apo_zero, apo_down, discopop, dpop, sft),
    )
}
# Losses that are not a function of the log-ratios alone: their value at the reference is not known beforehand.
_NOT_OF_LOGRATIOS = {"sft"}
# Squares of a distance of 1 / (2 beta): how much faster than beta Δ they move at the reference.
_SQUARES = {"ipo", "ipo_sum", "sppo_hard"}


def loss_terms(config: LossConfig) -> list[tuple[str, float]]:
    """(name, weight) of each loss of a configuration.

    Raises:
        UserError: an unknown name, or a value that its loss cannot have.
    """
    names = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
    weights = [1.0] * len(names) if config.loss_weights is None else config.loss_weights
    if not names or len(weights) != len(names):
        raise UserError(f"--loss_weights {weights}: expected {len(names)} numbers, one for each of --loss_type {names}")
    for name in names:
        if name not in LOSSES:
            raise UserError(f"--loss_type {name}: unknown; choose one of {', '.join(sorted(LOSSES))}")
    if config.f_divergence_type not in DIVERGENCES:
        known = ", ".join(sorted(DIVERGENCES))
        raise UserError(f"--f_divergence_type {config.f_divergence_type}: unknown; choose one of {known}")
    if "robust" in names and not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {config.label_smoothing}: the robust loss needs a value in [0, 0.5)")
    if "exo_pair" in names and not 0 < config.label_smoothing < 1:
        raise UserError(f"--label_smoothing {config.label_smoothing}: exo_pair needs a value in (0, 1), such as 0.001")
    return list(zip(names, weights, strict=True))


def preference_loss(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(P,) weighted sum of the losses that a configuration names (MPO, Wang et al. 2024, arXiv 2411.10442, eq. 1)."""
    terms = [weight * LOSSES[name](pairs, config) for name, weight in loss_terms(config)]
    return torch.stack(terms).sum(0)


def loss_at_reference(config: LossConfig) -> float | None:
    """The loss where the policy is the reference, ln 2 for DPO; None where it depends on more than log-ratios."""
    if any(name in _NOT_OF_LOGRATIOS for name, _ in loss_terms(config)):
        return None
    zero = torch.zeros(1)
    return preference_loss(PairLogps(zero, zero, zero, zero, zero + 1, zero + 1), config).item()


def slope_at_reference(config: LossConfig) -> float:
    """By how much the loss may move, at most, for a move of 1 in beta Δ around the reference."""
    steepest = dict.fromkeys(_SQUARES, 1 / config.beta**2) | {"dpop": config.dpop_lambda}
    return sum(abs(weight) * max(1.0, steepest.get(name, 1.0)) for name, weight in loss_terms(config))
