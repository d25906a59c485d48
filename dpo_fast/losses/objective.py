"""From a configuration to one loss: named losses, a user's own, their weights, and what they need of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES
from dpo_fast.losses.facts import FACTS, LOSS_OPTIONS, Facts, Loss, facts_of, names_with
from dpo_fast.losses.pairs import DIVERGENCES, PairLogps
from dpo_fast.user_code import load_function


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
    takes_divergence = names_with("takes_divergence")
    if config.f_divergence_type != "reverse_kl" and (others := set(names) - takes_divergence):
        raise UserError(
            f"--f_divergence_type {config.f_divergence_type}: has no meaning for {', '.join(sorted(others))}; it acts "
            f"on {', '.join(sorted(takes_divergence))}"
        )
    for fault in (facts_of(name).fault(config) for name in names):
        if fault:
            raise UserError(fault)
    if config.use_weighting and (sorting := names_with("sorts_pairs").intersection(names)):
        raise UserError(f"--use_weighting: {', '.join(sorted(sorting))} sorts the pairs, so they cannot have weights")
    return [(_find(name), weight) for name, weight in zip(names, weights, strict=True)]


def check_loss(config: LossConfig) -> None:
    """Refuse a configuration in which something is out of range, or set and then never read.

    Raises:
        UserError: it names the option, and says what to change.
    """
    loss_terms(config)
    names = loss_names(config)
    read = {option for name in names for option in facts_of(name).options}
    if config.f_divergence_type == "alpha_divergence":
        read.add("f_alpha_divergence_coef")
    for option in (*LOSS_OPTIONS, "f_alpha_divergence_coef"):
        value = getattr(config, option)
        if option not in read and value != getattr(LossConfig(), option):
            raise UserError(f"--{option} {value}: not read by --loss_type {', '.join(names)}; {_cure(option, names)}")


def _cure(option: str, names: list[str]) -> str:
    if option == "f_alpha_divergence_coef":
        return "it belongs to --f_divergence_type alpha_divergence"
    if option == "label_smoothing" and "sigmoid" in names:
        return "DPO with label smoothing is --loss_type cdpo"
    return f"leave it out, or choose one of {', '.join(sorted(x for x in FACTS if option in FACTS[x].options))}"


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
    if sorting := names_with("sorts_pairs").intersection(loss_names(config)):
        raise UserError(f"--loss_type {', '.join(sorted(sorting))}: sorts the pairs, so they cannot have weights")
    return loss * pairs.weight


def needs_reference(config: LossConfig) -> bool:
    """Whether any named loss compares with a reference."""
    return any_loss(config, lambda facts: facts.needs_reference)


def any_loss(config: LossConfig, holds: Callable[[Facts], bool]) -> bool:
    """Whether something holds of any loss that a configuration names."""
    return any(holds(facts_of(name)) for name in loss_names(config))


def loss_at_reference(config: LossConfig) -> float | None:
    """The loss where the policy is the reference, ln 2 for DPO; None where it depends on more than log-ratios."""
    names = loss_names(config)
    terms = loss_terms(config)
    if any(":" in name for name in names) or any_loss(config, lambda facts: not facts.is_known_at_reference):
        return None
    zero = torch.zeros(1)
    at_reference = PairLogps(zero, zero, zero, zero, zero + 1, zero + 1)
    return sum(weight * loss(at_reference, config).item() for loss, weight in terms)


def slope_at_reference(config: LossConfig) -> float:
    """By how much the loss may move, at most, for a move of 1 in beta Δ around the reference."""
    weights = [weight for _, weight in loss_terms(config)]
    slopes = [max(1.0, facts_of(name).slope(config)) for name in loss_names(config)]
    return sum(abs(weight) * slope for weight, slope in zip(weights, slopes, strict=True))
