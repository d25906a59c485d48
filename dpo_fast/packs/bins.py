"""Which groups are trained on together: optimizer steps, and the packs of each step."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few bins as best-fit decreasing finds (at most 11/9 of the optimum, plus one).

    Args:
        lengths: tokens of each item.
        budget: tokens of a bin; a larger item gets a bin to itself.

    Returns:
        Indices of each bin's items; deterministic.
    """
    bins: list[list[int]] = []
    # Sorted (room left, bin): the first with enough room is the tightest fit.
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[item], -1))
        if place == len(room):
            left, target = budget, len(bins)
            bins.append([])
        else:
            left, target = room.pop(place)
        bins[target].append(item)
        insort(room, (left - lengths[item], target))
    return bins


class StepSampler:
    """Yields optimizer steps without end; each step is a list of packs, each pack a list of group indices.

    An epoch is a seeded random order of all groups, split into steps; the last step of an epoch may be smaller.
    """

    def __init__(self, lengths: Sequence[int], *, groups_per_step: int, max_tokens: int, seed: int) -> None:
        """Take each group's length in tokens, the groups per step, the token budget of a pack and the seed."""
        assert lengths, "a sampler needs at least one group"
        assert groups_per_step > 0
        self._lengths = list(lengths)
        self._groups_per_step = groups_per_step
        self.max_tokens = max_tokens
        self._seed = seed
        self._step = 0
        self._order_of: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every group once."""
        return -(-len(self._lengths) // self._groups_per_step)

    def __iter__(self) -> StepSampler:
        return self

    def __next__(self) -> list[list[int]]:
        epoch, place = divmod(self._step, self.steps_per_epoch)
        self._step += 1
        chosen = self._order(epoch)[place * self._groups_per_step :][: self._groups_per_step].tolist()
        packs = best_fit_decreasing([self._lengths[i] for i in chosen], self.max_tokens)
        return [[chosen[i] for i in packed] for packed in packs]

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
        return self._order_of[1]

    def state_dict(self) -> dict[str, Any]:
        """The position, and the settings that a resumed run must share."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps taken before.

        Raises:
            ValueError: the state is from different data or settings; the message names them.
        """
        own = self._identity()
        differing = [f"{name} is {own[name]}, was {state[name]}" for name in own if own[name] != state[name]]
        if differing:
            raise ValueError("; ".join(differing))
        self._step = state["step"]

    def _identity(self) -> dict[str, Any]:
        return {
            "groups per step": self._groups_per_step,
            "tokens per pack": self.max_tokens,
            "seed": self._seed,
            "data (hash of lengths)": xxhash.xxh3_64_hexdigest(np.asarray(self._lengths, dtype=np.int64).tobytes()),
        }
