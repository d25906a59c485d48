"""From a configuration to one loss: named losses, a user's own, their weights, and what they need of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.formulas import LOSSES, Loss
from dpo_fast.losses.pairs import DIVERGENCES, PairLogps
from dpo_fast.user_code import load_function

# No reference enters these, and none is scored where a run names no other loss.
REFERENCE_FREE = frozenset({"sft", "sft_tokens", "cpo", "slic", "simpo", "alphapo", "orpo", "odds_ratio", "tpo"})
# These sort the pairs of a pack, so that weights have no pair to belong to; those of a batch compare them in some way.
SORTING = frozenset({"aot", "aot_unpaired"})
OF_BATCH = SORTING | {"kto", "sft_tokens"}
OF_SCORES = frozenset({"odpo", "rpo"})
OF_GOLD = frozenset({"tpo"})
# Only in a difference of two scores does the partition function of f-DPO cancel.
OF_DIVERGENCE = frozenset(
    {
        "sigmoid",
        "cdpo",
        "robust",
        "hinge",
        "ipo",
        "ipo_sum",
        "sigmoid_norm",
        "exo_pair",
        "discopop",
        "dpop",
        "sft",
        "sft_tokens",
    }
    | OF_SCORES
)
# Squares of a distance of 1 / (2 beta): how much faster than beta Δ they move at the reference.
_SQUARES = ("ipo", "ipo_sum", "sppo_hard")


def loss_names(config: LossConfig) -> list[str]:
    """The names in `loss_type`, one or a list."""
    return [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)


def loss_terms(config: LossConfig) -> list[tuple[Loss, float]]:
    """(loss, weight) of each loss of a configuration.

    Raises:
        UserError: an unknown name, or a value that its loss cannot have.
    """
    names = loss_names(config)
    weights = [1.0] * len(names) if config.loss_weights is None else config.loss_weights
    if not names or len(weights) != len(names):
        raise UserError(f"--loss_weights {weights}: expected {len(names)} numbers, one for each of --loss_type {names}")
    if config.f_divergence_type not in DIVERGENCES:
        known = ", ".join(sorted(DIVERGENCES))
        raise UserError(f"--f_divergence_type {config.f_divergence_type}: unknown; choose one of {known}")
    if config.f_divergence_type != "reverse_kl" and (others := set(names) - OF_DIVERGENCE):
        raise UserError(
            f"--f_divergence_type {config.f_divergence_type}: has no meaning for {', '.join(sorted(others))}; it acts "
            f"on {', '.join(sorted(OF_DIVERGENCE))}"
        )
    if "robust" in names and not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {config.label_smoothing}: the robust loss needs a value in [0, 0.5)")
    if "exo_pair" in names and not 0 < config.label_smoothing < 1:
        raise UserError(f"--label_smoothing {config.label_smoothing}: exo_pair needs a value in (0, 1), such as 0.001")
    if config.use_weighting and (sorting := SORTING.intersection(names)):
        raise UserError(f"--use_weighting: {', '.join(sorted(sorting))} sorts the pairs, so they cannot have weights")
    return [(_find(name), weight) for name, weight in zip(names, weights, strict=True)]


def _find(name: str) -> Loss:
    if ":" in name:
        return _own_loss(name)
    if name not in LOSSES:
        raise UserError(
            f"--loss_type {name}: unknown; choose one of {', '.join(sorted(LOSSES))}, or name a function of your own "
            "as module:function"
        )
    return LOSSES[name]


@cache
def _own_loss(name: str) -> Loss:
    """A user's `f(pairs: PairLogps) -> (P,) losses` by `module:function`; the module may lie in the working folder."""
    function = load_function(name, f"--loss_type {name}")
    return partial(_call_own, name, function)


def _call_own(name: str, function: Callable[[PairLogps], Tensor], pairs: PairLogps, config: LossConfig) -> Tensor:
    losses = function(pairs)
    if not isinstance(losses, Tensor) or losses.shape != pairs.chosen.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(f"--loss_type {name}: expected one loss per pair, {tuple(pairs.chosen.shape)}; got {found}")
    return losses


def preference_loss(pairs: PairLogps, config: LossConfig) -> Tensor:
    """(P,) weighted sum of the losses that a configuration names (MPO, Wang et al. 2024, arXiv 2411.10442, eq. 1).

    Each is multiplied by `pairs.weight`, a row's own weight or WPO's.

    Raises:
        UserError: weights for losses that sort the pairs, or a row that lacks what a loss needs.
    """
    loss = torch.stack([weight * loss(pairs, config) for loss, weight in loss_terms(config)]).sum(0)
    if pairs.weight is None:
        return loss
    if sorting := SORTING.intersection(loss_names(config)):
        raise UserError(f"--loss_type {', '.join(sorted(sorting))}: sorts the pairs, so they cannot have weights")
    return loss * pairs.weight


def needs_reference(config: LossConfig) -> bool:
    """Whether any named loss compares with a reference."""
    return not REFERENCE_FREE.issuperset(loss_names(config))


def loss_at_reference(config: LossConfig) -> float | None:
    """The loss where the policy is the reference, ln 2 for DPO; None where it depends on more than log-ratios."""
    names = loss_names(config)
    terms = loss_terms(config)
    if any(":" in name for name in names) or (REFERENCE_FREE | OF_SCORES).intersection(names):
        return None
    zero = torch.zeros(1)
    at_reference = PairLogps(zero, zero, zero, zero, zero + 1, zero + 1)
    return sum(weight * loss(at_reference, config).item() for loss, weight in terms)


def slope_at_reference(config: LossConfig) -> float:
    """By how much the loss may move, at most, for a move of 1 in beta Δ around the reference."""
    steepest = dict.fromkeys(_SQUARES, 1 / config.beta**2) | {"dpop": config.dpop_lambda}
    weights = [weight for _, weight in loss_terms(config)]
    slopes = [max(1.0, steepest.get(name, 1.0)) for name in loss_names(config)]
    return sum(abs(weight) * slope for weight, slope in zip(weights, slopes, strict=True))
