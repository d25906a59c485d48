"""Which answers are compared, in which order and on which side: a function of the rows, the settings and the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.items import Item

# A comparison is repeated after at least this many others, if there are that many.
_REPEAT_AFTER = 10


@dataclass(frozen=True)
class Comparison:
    """Two answers of a row.

    Attributes:
        item: index of the row.
        left: index of the answer on the left.
        right: index of the answer on the right.
        first: for a repeat, the place in the queue where the two were shown before.
    """

    item: int
    left: int
    right: int
    first: int | None = None


def make_queue(items: Sequence[Item], config: LabelConfig) -> list[Comparison]:
    """All comparisons in random order on random sides, some repeated later; identical answers are not compared.

    Args:
        items: rows.
        config: `pairs`, `repeat_share` and `seed` are used.
    """
    rng = random.Random(config.seed)
    pairs = [(number, *pair) for number, item in enumerate(items) for pair in _pairs(item.answers, config.pairs)]
    rng.shuffle(pairs)
    repeats = min(round(config.repeat_share * len(pairs)), len(pairs))
    # The order is random, so leaving out the last ones, which could not be repeated later, does not bias the sample.
    candidates = range(max(repeats, len(pairs) - _REPEAT_AFTER))
    again = [(rng.uniform(min(i + _REPEAT_AFTER, len(pairs)), len(pairs)), i) for i in rng.sample(candidates, repeats)]
    places: dict[int, int] = {}
    queue: list[Comparison] = []
    for _, i in sorted([(float(i), i) for i in range(len(pairs))] + again):
        item, *answers = pairs[i]
        left, right = rng.sample(answers, 2)
        queue.append(Comparison(item, left, right, places.get(i)))
        places.setdefault(i, len(queue) - 1)
    return queue


def _pairs(answers: Sequence[str], which: str) -> list[tuple[int, int]]:
    numbers = range(len(answers))
    if which == "all":
        found = list(combinations(numbers, 2))
    else:
        found = list(pairwise(numbers if which == "adjacent" else numbers[:2]))
    return [(a, b) for a, b in found if answers[a] != answers[b]]
