"""Items into bins: which groups share a pack."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


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
