"""What the steps of a run compute: the packs of its own rows, or of typical ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from dpo_fast.packs.layout import Group
from dpo_fast.packs.steps import StepSampler
from dpo_fast.planning.setting import PackLoad

# Means of UltraFeedback's binarised rows (500, SmolLM2's tokenizer, --max_length 2048): prompt, and each answer.
TYPICAL_PROMPT, TYPICAL_ANSWER = 170, 277
# Steps that are laid out to find the largest pack and the mean step.
SIMULATED_STEPS = 1000
# Packs that the formula is asked about: the largest by tokens and by targets.
LARGEST = 4


@dataclass(frozen=True)
class Demand:
    """A pack, and whether its step has left gradients when it comes."""

    load: PackLoad
    with_gradients: bool


class Workload(Protocol):
    """Packs, for any token budget."""

    @property
    def pairs_per_step(self) -> float:
        """Of one GPU, in the mean."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with its prompt once."""

    def demands(self, max_tokens: int) -> list[Demand]:
        """Packs of which one takes the most memory."""

    def steps(self, max_tokens: int) -> list[list[PackLoad]]:
        """Packs of steps whose mean is the mean step."""


@dataclass(frozen=True)
class TypicalWorkload:
    """Pairs of typical length, shortened to `max_length`.

    Attributes:
        pairs_per_step: of one GPU.
        max_length: tokens of a prompt with one answer; None for no limit.
    """

    pairs_per_step: float
    max_length: int | None

    @property
    def _lengths(self) -> tuple[int, int]:
        whole = TYPICAL_PROMPT + TYPICAL_ANSWER
        share = min(1.0, (self.max_length or whole) / whole)
        return max(1, round(TYPICAL_PROMPT * share)), max(1, round(TYPICAL_ANSWER * share))

    @property
    def longest(self) -> int:
        """Tokens of a row whose prompt is half of `max_length`."""
        prompt, answer = self._lengths
        return prompt + 2 * answer if self.max_length is None else 3 * self.max_length // 2

    def demands(self, max_tokens: int) -> list[Demand]:
        """A full pack: of typical pairs, or the longest row alone where that is longer."""
        prompt, answer = self._lengths
        full = PackLoad.typical(max(max_tokens, 1), prompt, answer)
        if self.longest > max_tokens and self.max_length is not None:
            full = PackLoad.typical(self.longest, self.max_length // 2, self.max_length // 2)
        return [Demand(full, with_gradients=self.pairs_per_step > full.pairs)]

    def steps(self, max_tokens: int) -> list[list[PackLoad]]:
        """One step, its packs equally full."""
        prompt, answer = self._lengths
        tokens = self.pairs_per_step * (prompt + 2 * answer)
        count = max(1, -(-int(tokens) // max_tokens))
        return [[PackLoad.typical(tokens / count, prompt, answer)] * count]


class RowWorkload:
    """The rows of a run, in the packs that its first epoch will use."""

    def __init__(self, groups: Sequence[Group], *, rows_per_step: int, seed: int, static_shapes: bool = False) -> None:
        """Take what the run's sampler takes; with `static_shapes` every pack is filled up to the budget."""
        self._groups = groups
        self._lengths = [group.num_tokens for group in groups]
        self._figures = np.array([astuple(PackLoad.of([group])) for group in groups])
        self._rows_per_step, self._seed, self._static = rows_per_step, seed, static_shapes
        self.longest = max(self._lengths)
        self.num_pairs = sum(len(group.pairs) for group in groups)
        self.pairs_per_step = self.num_pairs * rows_per_step / max(len(groups), rows_per_step)
        self._cache: dict[int, list[list[PackLoad]]] = {}

    def steps(self, max_tokens: int) -> list[list[PackLoad]]:
        """The first epoch's steps, at most SIMULATED_STEPS."""
        if max_tokens not in self._cache:
            sampler = StepSampler(
                self._groups, groups_per_step=self._rows_per_step, max_tokens=max_tokens, seed=self._seed
            )
            count = min(sampler.steps_per_epoch, SIMULATED_STEPS)
            self._cache[max_tokens] = [[self._load(p, max_tokens) for p in next(sampler).packs] for _ in range(count)]
        return self._cache[max_tokens]

    def demands(self, max_tokens: int) -> list[Demand]:
        """The largest packs, by tokens and by targets, first ones of a step and later ones."""
        found = [
            Demand(load, with_gradients=place > 0) for step in self.steps(max_tokens) for place, load in enumerate(step)
        ]
        largest = []
        for is_later in (False, True):
            some = [demand for demand in found if demand.with_gradients == is_later]
            largest += sorted(some, key=lambda demand: -demand.load.tokens)[:LARGEST]
            largest += sorted(some, key=lambda demand: -demand.load.targets)[:LARGEST]
        return largest

    def _load(self, packed: Sequence[int], max_tokens: int) -> PackLoad:
        figures = self._figures[list(packed)].sum(0).tolist()
        if self._static:
            figures[0] = max(figures[0], max_tokens)
        return PackLoad(*figures)
