"""Which process takes which groups, so that none waits for another.

The cost of a group has a linear and a quadratic term in its length; the unit is the work of one token:

    cost = T + E / 6D        T tokens, E attention scores: P²/2 of the prompt, A (P + A/2) of each answer

A decoder layer of width D spends about 24 D² flop on a token's products and 4 D on a score: 6 D scores cost a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_fast.packs.bins import best_fit_decreasing


def group_cost(prompt_length: int, answer_lengths: Iterable[int], hidden_size: int) -> float:
    """Work of a group whose prompt is computed once; the unit is the work of one token."""
    answers = list(answer_lengths)
    scores = prompt_length**2 / 2 + sum(length * (prompt_length + length / 2) for length in answers)
    return prompt_length + sum(answers) + scores / (6 * hidden_size)


def deal(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Split items into shares of the same size and of costs as equal as a greedy rule gets them.

    Args:
        costs: cost of each item; the number of items must be a multiple of `num_shares`.
        num_shares: at least 1.

    Returns:
        Indices of each share's items; deterministic.

    Raises:
        ValueError: the items cannot be split evenly.
    """
    size, rest = divmod(len(costs), num_shares)
    if rest:
        raise ValueError(f"costs: expected a multiple of {num_shares} items, got {len(costs)}")
    return _shares(costs, num_shares, size)


def _shares(costs: Sequence[float], num_shares: int, size: int) -> list[list[int]]:
    """Most expensive first, each to the cheapest share that still has room for one of its `size` items."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0.0] * num_shares
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min((k for k in range(num_shares) if len(shares[k]) < size), key=lambda k: (sums[k], k))
        shares[target].append(item)
        sums[target] += costs[item]
    return shares


def deal_packs(
    lengths: Sequence[int], costs: Sequence[float], *, num_ranks: int, max_tokens: int
) -> list[list[list[int]]]:
    """Each process's packs of a step: all have the same number of packs, since the processes of a step go in lockstep.

    Args:
        lengths: tokens of each item of the step.
        costs: of each item, see `group_cost`.
        num_ranks: processes, at least 1.
        max_tokens: token budget of a pack.

    Returns:
        For each process, packs of indices; deterministic. A pack is empty where a process has fewer items than another
        has packs.
    """
    dealt = []
    for share in map(sorted, _shares(costs, num_ranks, len(costs))):
        bins = best_fit_decreasing([lengths[i] for i in share], max_tokens)
        dealt.append([[share[i] for i in items] for items in bins])
    num_packs = max(map(len, dealt))
    return [_cut_into(packs, num_packs) for packs in dealt]


def _cut_into(packs: list[list[int]], num_packs: int) -> list[list[int]]:
    """Halve the packs with the most items until there are enough; empty ones follow where no item is left to part."""
    packs = list(packs)
    while len(packs) < num_packs:
        largest = max(packs, key=len, default=[])
        if len(largest) < 2:
            packs.append([])
            continue
        packs.remove(largest)
        packs += [largest[::2], largest[1::2]]
    return packs


class BalancedSampler:
    """Reorders a sampler's indices between processes within each micro-batch: every step keeps its rows."""

    def __init__(self, sampler: Any, costs: Sequence[float], *, num_processes: int, batch_size: int) -> None:
        """Wrap a sampler of indices into `costs`.

        Of every `num_processes` runs of `batch_size` indices, process k takes the k-th.
        """
        self.sampler = sampler
        self._costs = costs
        self._num_processes = num_processes
        self._window = num_processes * batch_size

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        whole = len(order) - len(order) % self._window
        # An incomplete last micro-batch is filled up with the epoch's first rows, so these must stay in place.
        start = 0 if whole == len(order) else min(self._window, whole)
        yield from order[:start]
        for first in range(start, whole, self._window):
            window = order[first : first + self._window]
            for share in deal([self._costs[i] for i in window], self._num_processes):
                yield from (window[i] for i in share)
        yield from order[whole:]

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to a sampler whose order depends on it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
