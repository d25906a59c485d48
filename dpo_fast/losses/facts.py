"""The facts of a loss, declared where it is defined; whatever needs to know about losses asks here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dpo_fast.config import LossConfig
from dpo_fast.losses.pairs import PairLogps

Loss = Callable[[PairLogps, LossConfig], Tensor]


def _one(config: LossConfig) -> float:
    return 1.0


def _anything(config: LossConfig) -> None:
    return None


# Options of `LossConfig` that are read by some losses alone.
LOSS_OPTIONS = (
    *("label_smoothing", "discopop_tau", "dpop_lambda", "simpo_gamma", "alphapo_alpha", "tpo_alpha", "score_scale"),
    *("desirable_weight", "undesirable_weight"),
)


@dataclass(frozen=True)
class Facts:
    """The defaults hold for a loss of a pair's two log-ratios, and are taken for a function of the user's own.

    Attributes:
        needs_reference: it compares with a reference; else none is scored where a run names no other loss.
        needs_scores: of rows whose true scores are known.
        needs_gold: of rows with a third, better answer.
        compares_pairs: a pair's loss depends on the others of its step.
        sorts_pairs: its losses belong to ranks, so that weights have no pair to belong to.
        takes_divergence: it is made of the difference of two scores, in which the partition function of an f-divergence
            cancels.
        is_length_normalised: scores are divided by the answers' lengths.
        pools_tokens: it averages over all tokens of a batch, not answer by answer.
        reads_chosen_alone: the rejected answer does not enter.
        options: those of `LossConfig` that it reads, besides `beta` and the divergence's.
        slope: by how much it may move, at most, for a move of 1 in beta Δ around the reference.
        fault: what is wrong with a configuration, or None.
    """

    needs_reference: bool = True
    needs_scores: bool = False
    needs_gold: bool = False
    compares_pairs: bool = False
    sorts_pairs: bool = False
    takes_divergence: bool = False
    is_length_normalised: bool = False
    pools_tokens: bool = False
    reads_chosen_alone: bool = False
    options: tuple[str, ...] = ()
    slope: Callable[[LossConfig], float] = _one
    fault: Callable[[LossConfig], str | None] = _anything

    @property
    def is_known_at_reference(self) -> bool:
        """Where the policy is the reference it is a number, the same for all pairs."""
        return self.needs_reference and not self.needs_scores


LOSSES: dict[str, Loss] = {}
FACTS: dict[str, Facts] = {}


def loss(facts: Facts = Facts()) -> Callable[[Loss], Loss]:
    """Enter a function in `LOSSES` under its own name."""

    def enter(function: Loss) -> Loss:
        LOSSES[function.__name__], FACTS[function.__name__] = function, facts
        return function

    return enter


def facts_of(name: str) -> Facts:
    """Of a loss by name; of a function of the user's own the defaults."""
    return FACTS.get(name, Facts())


def names_with(fact: str) -> frozenset[str]:
    """The losses of which a fact holds."""
    return frozenset(name for name, facts in FACTS.items() if getattr(facts, fact))
