"""The optimizer steps of a run: which groups are trained on together, and the packs of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from dpo_fast.packs.balance import deal_packs, group_cost
from dpo_fast.packs.layout import Group

# A row's share of attention in its cost depends on the model's width; any usual one deals about the same.
TYPICAL_WIDTH = 4096
_GROUPS_PER_STEP = "groups per step"


def group_packs(groups: Sequence[Group], *, num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Each process's packs of these groups, see `deal_packs`."""
    lengths, costs = _sizes(groups)
    return deal_packs(lengths, costs, num_ranks=num_ranks, max_tokens=max_tokens)


def _sizes(groups: Sequence[Group]) -> tuple[list[int], list[float]]:
    """Tokens and cost of each group."""
    costs = [group_cost(len(group.prompt_ids), map(len, group.answers), TYPICAL_WIDTH) for group in groups]
    return [group.num_tokens for group in groups], costs


def rows_of_step(state: dict[str, Any]) -> int | None:
    """The groups of a step, of a `StepSampler`'s state; None if it is damaged."""
    number = state.get(_GROUPS_PER_STEP)
    return number if type(number) is int and number > 0 else None


@dataclass(frozen=True)
class Step:
    """Indices of the groups of an optimizer step, and this process's packs of them.

    A pack is empty where this process has nothing to do while another has.
    """

    groups: list[int]
    packs: list[list[int]]


class StepSampler:
    """Yields optimizer steps without end.

    An epoch is a seeded random order of all groups, split into steps; the last step of an epoch may be smaller.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        groups_per_step: int,
        max_tokens: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Take the groups, how many make a step, the token budget of a pack, the seed, and who shares a step."""
        assert groups, "a sampler needs at least one group"
        assert groups_per_step > 0
        self._lengths, self._costs = _sizes(groups)
        self._groups_per_step = groups_per_step
        self.max_tokens = max_tokens
        self._seed = seed
        self._rank, self._num_ranks = rank, num_ranks
        self._step = 0
        self._order_of: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every group once."""
        return -(-len(self._lengths) // self._groups_per_step)

    def __iter__(self) -> StepSampler:
        return self

    def __next__(self) -> Step:
        epoch, place = divmod(self._step, self.steps_per_epoch)
        self._step += 1
        chosen = self._order(epoch)[place * self._groups_per_step :][: self._groups_per_step].tolist()
        lengths, costs = ([values[i] for i in chosen] for values in (self._lengths, self._costs))
        packs = deal_packs(lengths, costs, num_ranks=self._num_ranks, max_tokens=self.max_tokens)[self._rank]
        return Step(chosen, [[chosen[i] for i in packed] for packed in packs])

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
            _GROUPS_PER_STEP: self._groups_per_step,
            "tokens per pack": self.max_tokens,
            "seed": self._seed,
            "data (hash of lengths)": xxhash.xxh3_64_hexdigest(np.asarray(self._lengths, dtype=np.int64).tobytes()),
        }
