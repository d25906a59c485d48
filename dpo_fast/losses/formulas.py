"""Every preference loss: small pure functions of fp32 sequence log-probs.

Each takes `PairLogps` and `LossConfig` and returns one loss per pair, (P,) fp32, not yet averaged; the notation is that
of `pairs.py`. A new one needs nothing but a function here, under `@loss(Facts(...))` with what is not as usual of it,
and its row in docs/losses.md: help, checks, warnings and step 0 know it by that. `objective.py` adds up those that a
configuration names. Labels and names are TRL's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.facts import Facts, loss
from dpo_fast.losses.pairs import PairLogps, divergence_margin, expm1, mean_divergence_margin


def _slope_of_square(config: LossConfig) -> float:
    """The square of a distance of 1 / (2 beta)."""
    return 1 / config.beta**2


def _needs_smoothing_below_half(config: LossConfig) -> str | None:
    if 0 <= config.label_smoothing < 0.5:
        return None
    return f"--label_smoothing {config.label_smoothing}: the robust loss needs a value in [0, 0.5)"


def _needs_smoothing(config: LossConfig) -> str | None:
    if 0 < config.label_smoothing < 1:
        return None
    return f"--label_smoothing {config.label_smoothing}: exo_pair needs a value in (0, 1), such as 0.001"


@loss(Facts(takes_divergence=True))
def sigmoid(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Δ). DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. With label smoothing: `cdpo`."""
    return -F.logsigmoid(config.beta * divergence_margin(pairs, config))


def _smoothed(logits: Tensor, config: LossConfig) -> Tensor:
    """-(1 - ε) log sigmoid(x) - ε log sigmoid(-x), ε = `label_smoothing`."""
    return -(1 - config.label_smoothing) * F.logsigmoid(logits) - config.label_smoothing * F.logsigmoid(-logits)


@loss(Facts(takes_divergence=True, options=("label_smoothing",)))
def cdpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-(1 - ε) log sigmoid(beta Δ) - ε log sigmoid(-beta Δ), ε = `label_smoothing`.

    Conservative DPO, Mitchell 2023 ("A note on DPO with noisy preferences", eq. 3).
    """
    return _smoothed(config.beta * divergence_margin(pairs, config), config)


@loss(Facts(takes_divergence=True, fault=_needs_smoothing_below_half, options=("label_smoothing",)))
def robust(pairs: PairLogps, config: LossConfig) -> Tensor:
    """[-(1 - ε) log sigmoid(beta Δ) + ε log sigmoid(-beta Δ)] / (1 - 2ε), ε = `label_smoothing` below 1/2.

    rDPO, unbiased where a share ε of the labels is flipped. Chowdhury et al. 2024 (arXiv 2403.00409), eq. 8.
    """
    logits, smoothing = config.beta * divergence_margin(pairs, config), config.label_smoothing
    noisy = -(1 - smoothing) * F.logsigmoid(logits) + smoothing * F.logsigmoid(-logits)
    return noisy / (1 - 2 * smoothing)


@loss(Facts(takes_divergence=True))
def hinge(pairs: PairLogps, config: LossConfig) -> Tensor:
    """max(0, 1 - beta Δ). RSO, Liu et al. 2023 (arXiv 2309.06657), section 3.3."""
    return F.relu(1 - config.beta * divergence_margin(pairs, config))


@loss(Facts(takes_divergence=True, is_length_normalised=True, slope=_slope_of_square))
def ipo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(Δ̄ - 1/(2 beta))², Δ̄ the margin with each score divided by its answer's length.

    IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17; beta is the paper's τ. Lengths: the mean over tokens is TRL's
    convention; `ipo_sum` is the paper's.
    """
    return (mean_divergence_margin(pairs, config) - 1 / (2 * config.beta)) ** 2


@loss(Facts(takes_divergence=True, slope=_slope_of_square))
def ipo_sum(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(Δ - 1/(2 beta))². IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17 to the letter: sums over tokens."""
    return (divergence_margin(pairs, config) - 1 / (2 * config.beta)) ** 2


@loss(Facts(takes_divergence=True, is_length_normalised=True))
def sigmoid_norm(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Δ̄), Δ̄ as in `ipo`: length-normalised DPO, Tulu 3 (arXiv 2411.15124), section 5. Lengths."""
    return -F.logsigmoid(config.beta * mean_divergence_margin(pairs, config))


@loss(Facts(takes_divergence=True, fault=_needs_smoothing, options=("label_smoothing",)))
def exo_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """KL(q || p), q = (sigmoid(beta Δ), sigmoid(-beta Δ)), p = (1 - ε, ε), ε = `label_smoothing` above 0.

    EXO, Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """
    logits, smoothing = config.beta * divergence_margin(pairs, config), config.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


@loss()
def nca_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta r_w) - ½ log sigmoid(-beta r_w) - ½ log sigmoid(-beta r_l).

    NCA, Chen et al. 2024 (arXiv 2402.05369), the preference form of algorithm 1.
    """
    chosen, rejected = config.beta * pairs.chosen_logratio, config.beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@loss()
def bco_pair(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l).

    BCO, Jung et al. 2024 (arXiv 2404.04656), eq. 8, with the reward shift δ at 0, as TRL has it; `bco` shifts.
    """
    return -F.logsigmoid(config.beta * pairs.chosen_logratio) - F.logsigmoid(-config.beta * pairs.rejected_logratio)


@loss()
def bco(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta r_w - δ) - log sigmoid(-(beta r_l - δ)), δ the mean reward of both answers so far.

    BCO, Jung et al. 2024 (arXiv 2404.04656), eq. 8 and section 3.3. Here δ is the mean over all pairs of earlier steps
    (`reward_shift`), 0 at the first, so that a step's loss does not depend on how it is cut into packs.
    """
    shift = 0.0 if pairs.reward_shift is None else pairs.reward_shift
    chosen, rejected = config.beta * pairs.chosen_logratio - shift, config.beta * pairs.rejected_logratio - shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss(Facts(slope=_slope_of_square))
def sppo_hard(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(r_w - 1/(2 beta))² + (r_l + 1/(2 beta))². SPPO, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P in {0, 1}."""
    target = 0.5 / config.beta
    return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2


@loss()
def apo_zero(pairs: PairLogps, config: LossConfig) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l), for chosen answers better than the model's own.

    APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    return torch.sigmoid(-config.beta * pairs.chosen_logratio) + torch.sigmoid(config.beta * pairs.rejected_logratio)


@loss()
def apo_down(pairs: PairLogps, config: LossConfig) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)), for chosen answers worse than the model's own.

    APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8.
    """
    return torch.sigmoid(config.beta * pairs.chosen_logratio) + torch.sigmoid(-config.beta * pairs.margin)


@loss(Facts(takes_divergence=True, options=("discopop_tau",)))
def discopop(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(1 - m) log(1 + e^-x) + m e^-x, x = beta Δ, m = sigmoid(x / `discopop_tau`).

    DiscoPOP's log-ratio modulated loss, Lu et al. 2024 (arXiv 2406.08414), eq. 5.
    """
    logits = config.beta * divergence_margin(pairs, config)
    modulated = logits / config.discopop_tau
    # m e^-x as one exponential: far from the reference its factors are 0 and infinity.
    return -F.logsigmoid(logits) * torch.sigmoid(-modulated) + torch.exp(F.logsigmoid(modulated) - logits)


@loss(Facts(takes_divergence=True, slope=lambda config: config.dpop_lambda, options=("dpop_lambda",)))
def dpop(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (Δ - λ max(0, -r_w))), λ = `dpop_lambda`: DPO that keeps the chosen from falling.

    DPO-Positive, Pal et al. 2024 (arXiv 2402.13228), eq. 3.
    """
    penalty = config.dpop_lambda * F.relu(-pairs.chosen_logratio)
    return -F.logsigmoid(config.beta * (divergence_margin(pairs, config) - penalty))


@loss(Facts(needs_scores=True, takes_divergence=True, options=("score_scale",)))
def odpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Δ - η g), g the row's score gap, η = `score_scale`: better answers must win by more.

    DPO with an offset, Amini et al. 2024 (arXiv 2402.10571), eq. 8. Scores.
    """
    return -F.logsigmoid(config.beta * divergence_margin(pairs, config) - config.score_scale * _score_gap(pairs))


@loss(Facts(needs_scores=True, takes_divergence=True, options=("score_scale",)))
def rpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """KL(Bernoulli(sigmoid(η g)) || Bernoulli(sigmoid(beta Δ))), g the row's score gap, η = `score_scale`.

    Reward-aware preference optimization, Nemotron-4 340B (arXiv 2406.11704), section 3.3.2. Scores.
    """
    got, true = config.beta * divergence_margin(pairs, config), config.score_scale * _score_gap(pairs)
    won = torch.sigmoid(true) * (F.logsigmoid(true) - F.logsigmoid(got))
    return won + torch.sigmoid(-true) * (F.logsigmoid(-true) - F.logsigmoid(-got))


def _score_gap(pairs: PairLogps) -> Tensor:
    if pairs.score_gap is None:
        raise UserError(
            "this loss needs the difference of the answers' true scores: rows of responses and scores, or "
            "--margin_column with a number per row"
        )
    return pairs.score_gap


@loss(Facts(compares_pairs=True, sorts_pairs=True, options=("label_smoothing",)))
def aot(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The loss of `cdpo` on δ_k = sort(log pi(w) - log pi(l))_k - sort(log ref(w) - log ref(l))_k.

    AOT on paired data, Melnyk et al. 2024 (arXiv 2406.05882), algorithm 1: the policy's margins dominate the
    reference's as a distribution. Batch: the k-th loss belongs to the k-th rank, not to the k-th pair.
    """
    policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _smoothed(config.beta * (policy.sort().values - reference.sort().values), config)


@loss(Facts(compares_pairs=True, sorts_pairs=True, options=("label_smoothing",)))
def aot_unpaired(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The loss of `cdpo` on δ_k = sort(r_w)_k - sort(r_l)_k: chosen ratios dominate rejected ones as a distribution.

    AOT on unpaired data, Melnyk et al. 2024 (arXiv 2406.05882), algorithm 1. Batch, as for `aot`.
    """
    delta = pairs.chosen_logratio.sort().values - pairs.rejected_logratio.sort().values
    return _smoothed(config.beta * delta, config)


@loss(Facts(compares_pairs=True, options=("desirable_weight", "undesirable_weight")))
def kto(pairs: PairLogps, config: LossConfig) -> Tensor:
    """λ_D (1 - sigmoid(beta (r_w - z_l))) + λ_U (1 - sigmoid(beta (z_w - r_l))), z = max(0, mean of r over the batch).

    KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8, on pairs: each answer's reference point is the KL estimate
    from the other side's answers, without gradient, as in the authors' code for pairs. λ_D = `desirable_weight`,
    λ_U = `undesirable_weight`. `FusedLinearKTOLoss` takes unpaired answers and a KL of your own. Batch.
    """
    chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
    chosen_kl, rejected_kl = (x.detach().mean().clamp(min=0) for x in (chosen, rejected))
    desirable = kto_term(config.beta, chosen - rejected_kl)
    return config.desirable_weight * desirable + config.undesirable_weight * kto_term(config.beta, chosen_kl - rejected)


def kto_term(beta: float, gain: Tensor) -> Tensor:
    """1 - sigmoid(beta · gain), KTO's loss of one answer; gain is r - z for a desirable one, z - r for another."""
    return torch.sigmoid(-beta * gain)


@loss(Facts(needs_reference=False, reads_chosen_alone=True, takes_divergence=True))
def sft(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log pi(w|x) / |w|: the chosen answer's cross-entropy, to be added to another loss by `loss_weights`.

    The second term of RPO, Pang et al. 2024 (arXiv 2404.19733), eq. 1. Answers have equal weight; TRL averages over all
    chosen tokens of a batch, so that long answers count more. Lengths; no reference.
    """
    return -pairs.chosen_mean


@loss(
    Facts(needs_reference=False, compares_pairs=True, pools_tokens=True, reads_chosen_alone=True, takes_divergence=True)
)
def sft_tokens(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-Σ log pi(w|x) / Σ |w| over the batch, the same for each of its pairs: TRL's convention of `sft`.

    Batch; lengths; no reference.
    """
    return (-pairs.chosen.sum() / pairs.chosen_len.sum().clamp(min=1)).expand_as(pairs.chosen)


@loss(Facts(needs_reference=False, options=("label_smoothing",)))
def cpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The loss of `cdpo` on log pi(w) - log pi(l).

    CPO, Xu et al. 2024 (arXiv 2401.08417), eq. 3; its second term is `sft`. No reference.
    """
    return _smoothed(config.beta * (pairs.chosen - pairs.rejected), config)


@loss(Facts(needs_reference=False))
def slic(pairs: PairLogps, config: LossConfig) -> Tensor:
    """max(0, 1 - beta (log pi(w) - log pi(l))), which is beta times the paper's loss with δ = 1/beta.

    SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), eq. 1; its second term is `sft`. No reference.
    """
    return F.relu(1 - config.beta * (pairs.chosen - pairs.rejected))


@loss(Facts(needs_reference=False, is_length_normalised=True, options=("label_smoothing", "simpo_gamma")))
def simpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The loss of `cdpo` on beta (log pi(w)/|w| - log pi(l)/|l|) - γ, before beta; γ = `simpo_gamma`.

    SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6. Lengths; no reference.
    """
    return _smoothed(config.beta * (pairs.chosen_mean - pairs.rejected_mean) - config.simpo_gamma, config)


@loss(
    Facts(needs_reference=False, is_length_normalised=True, options=("label_smoothing", "simpo_gamma", "alphapo_alpha"))
)
def alphapo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The loss of `simpo` with the reward (1 - p^-α) / α in place of log p, p = pi(y)^(1/|y|), α = `alphapo_alpha`.

    AlphaPO, Gupta et al. 2025 (arXiv 2501.03884), eq. 8; α = 0 is SimPO. Lengths; no reference.
    """
    alpha = config.alphapo_alpha
    if alpha == 0:
        return simpo(pairs, config)
    chosen, rejected = (-expm1(-alpha * x) / alpha for x in (pairs.chosen_mean, pairs.rejected_mean))
    return _smoothed(config.beta * (chosen - rejected) - config.simpo_gamma, config)


@loss(Facts(needs_reference=False, is_length_normalised=True))
def orpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log p_w - beta log sigmoid(log odds(p_w) - log odds(p_l)), p = pi(y)^(1/|y|), odds(p) = p / (1 - p).

    ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7; beta is the paper's λ. Lengths; no reference. The first term
    is `sft`, averaged as there.
    """
    return sft(pairs, config) + odds_ratio(pairs, config)


@loss(Facts(needs_reference=False, is_length_normalised=True))
def odds_ratio(pairs: PairLogps, config: LossConfig) -> Tensor:
    """The second term of `orpo`, ORPO's eq. 7 times beta. Lengths; no reference."""
    return -config.beta * F.logsigmoid(log_odds_ratio(pairs))


def log_odds_ratio(pairs: PairLogps) -> Tensor:
    """(P,) log odds(p_w) - log odds(p_l), p = pi(y)^(1/|y|)."""
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    return chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact at both ends; a certain answer, x = 0, counts as one of p = 1 - 1e-7."""
    x = x.clamp(max=-1e-7)
    near_zero = x > -math.log(2)
    # Each branch gets an argument that it is exact for, so that the other one's gradient is no nan.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    return torch.where(near_zero, near, torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))))


@loss(Facts(needs_reference=False, needs_gold=True, options=("tpo_alpha",)))
def tpo(pairs: PairLogps, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (log pi(w) - log pi(l))) - α log pi(g)/|g|, g the gold answer, α = `tpo_alpha`.

    Triple preference optimization, Saeidi et al. 2024 (arXiv 2405.16681), eq. 8; the gold answer's term is averaged as
    in `sft`. A gold answer; lengths; no reference.
    """
    if pairs.gold is None or pairs.gold_len is None:
        raise UserError("tpo needs a third answer that is better than both: name its column with --gold_column")
    gold = pairs.gold / pairs.gold_len.clamp(min=1)
    return -F.logsigmoid(config.beta * (pairs.chosen - pairs.rejected)) - config.tpo_alpha * gold
