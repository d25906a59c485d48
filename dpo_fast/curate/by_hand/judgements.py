"""What is compared, in which order and on which side, and what a person said about it.

The queue follows from the rows, the settings and the seed alone. Judgements are given along it, so the last one is
always the furthest, and a place in the queue is the key under which the log keeps a judgement; taking one back sets
it to null.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.items import Item
from dpo_fast.curate.rows import Row
from dpo_fast.curate.worklog import WorkLog

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
BY_HAND = "by_hand"
# A comparison comes back after so many others at least, where there are as many.
_REPEAT_AFTER = 10


class StaleError(Exception):
    """A judgement of a comparison that is no longer the one to judge."""


@dataclass(frozen=True)
class Comparison:
    """Two answers of a row.

    Attributes:
        item: number of the row.
        left: number of the answer on the left.
        right: number of the one on the right.
        first: place in the queue where the two were shown before, if they were.
    """

    item: int
    left: int
    right: int
    first: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far a person is.

    Attributes:
        done: comparisons judged or skipped.
        total: comparisons to show.
        skipped: of those done.
        repeated: comparisons judged twice.
        agreed: of these, judged alike.
        seconds: between showing and judging, all together.
    """

    done: int
    total: int
    skipped: int
    repeated: int
    agreed: int
    seconds: float

    def render(self) -> str:
        """`12 of 40 done, 1 skipped, agreement with yourself 3 of 4`."""
        parts = [f"{self.done} of {self.total} done"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        if self.repeated:
            parts.append(f"agreement with yourself {self.agreed} of {self.repeated}")
        return ", ".join(parts)


def make_queue(items: Sequence[Item], config: LabelConfig) -> list[Comparison]:
    """All comparisons in random order on random sides, some of them once more later; answers that are alike have none.

    Args:
        items: rows.
        config: `pairs`, `repeat_share` and `seed` are used.
    """
    rng = random.Random(config.seed)
    pairs = [(number, *pair) for number, item in enumerate(items) for pair in _pairs(item.answers, config.pairs)]
    rng.shuffle(pairs)
    repeats = min(round(config.repeat_share * len(pairs)), len(pairs))
    # The order is random, so that those near the end, which could not come back later, are like all others.
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


class Judging:
    """The queue, a person's place in it, and their judgements; each is in the log before the next one is shown."""

    def __init__(
        self,
        items: Sequence[Item],
        queue: Sequence[Comparison],
        log: WorkLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items, self._queue, self._log, self._clock = items, queue, log, clock
        self._shown_at: float | None = None
        places = sorted(int(key) for key, value in log.results.items() if key.isdigit() and value is not None)
        self._judged: dict[int, dict[str, Any]] = {place: log.results[str(place)] for place in places}

    @property
    def place(self) -> int:
        """Of the comparison to judge; the queue's length when all is judged."""
        place = next(reversed(self._judged), -1) + 1
        while place < len(self._queue) and self._is_left_out(self._queue[place]):
            place += 1
        return place

    def _is_left_out(self, comparison: Comparison) -> bool:
        """Whether it was skipped when it was shown first."""
        return comparison.first is not None and self._choice(comparison.first) == "skip"

    def _choice(self, place: int) -> Choice | None:
        return self._judged[place]["choice"] if place in self._judged else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to judge."""
        return self.place == len(self._queue)

    @property
    def can_undo(self) -> bool:
        """Whether there is a judgement to take back."""
        return bool(self._judged)

    def show(self) -> tuple[Item, str, str] | None:
        """The row to judge and the texts of its left and right answer; None when all is judged. The clock starts."""
        if self.is_finished:
            return None
        if self._shown_at is None:
            self._shown_at = self._clock()
        comparison = self._queue[self.place]
        item = self._items[comparison.item]
        return item, item.answers[comparison.left], item.answers[comparison.right]

    def judge(self, place: int, choice: Choice) -> None:
        """Keep a judgement; it is on disk when this returns.

        Args:
            place: of the comparison that is meant.
            choice: which answer is better.

        Raises:
            StaleError: another comparison is to be judged now.
            OSError: it could not be written, and does not count.
        """
        if self.is_finished or place != self.place:
            raise StaleError
        seconds = 0.0 if self._shown_at is None else self._clock() - self._shown_at
        judgement = {"choice": choice, "seconds": round(seconds, 2)}
        self._log.add({str(place): judgement})
        self._judged[place] = judgement
        self._shown_at = None

    def undo(self, place: int) -> None:
        """Take the last judgement back, so that its comparison is to be judged again.

        Args:
            place: of the comparison that is to be judged now, as whoever asks believes.

        Raises:
            StaleError: another one is, or there is no judgement.
            OSError: it could not be written, and the judgement still counts.
        """
        if not self._judged or place != self.place:
            raise StaleError
        last = next(reversed(self._judged))
        self._log.add({str(last): None})
        del self._judged[last]
        self._shown_at = None

    def progress(self) -> Progress:
        """How far it is, and how well repeated judgements agree."""
        choices = [judgement["choice"] for judgement in self._judged.values()]
        alike = [
            self._better(place) == self._better(comparison.first)
            for place, comparison in enumerate(self._queue)
            if comparison.first is not None and self._choice(place) not in (None, "skip")
        ]
        total = sum(not self._is_left_out(comparison) for comparison in self._queue)
        seconds = sum(judgement["seconds"] for judgement in self._judged.values())
        return Progress(len(choices), total, choices.count("skip"), len(alike), sum(alike), seconds)

    def _better(self, place: int) -> int | None:
        """Number of the answer that was found better; None for a tie."""
        comparison = self._queue[place]
        return {"left": comparison.left, "right": comparison.right}.get(self._judged[place]["choice"])

    def rows(self) -> list[Row]:
        """The rows with what was said about their answers.

        Returns:
            Each row with `scores`, the share of its comparisons that an answer won (ties half, null without any), the
            same as a signal, and `comparisons` as they were judged.
        """
        comparisons: list[list[Row]] = [[] for _ in self._items]
        for place, judgement in self._judged.items():
            if judgement["choice"] != "skip":
                comparison = self._queue[place]
                sides = {"left": comparison.left, "right": comparison.right}
                comparisons[comparison.item].append(sides | judgement)
        return [_result(item, judged) for item, judged in zip(self._items, comparisons, strict=True)]


def _result(item: Item, comparisons: list[Row]) -> Row:
    points: list[list[float]] = [[] for _ in item.answers]
    for comparison in comparisons:
        left = {"left": 1.0, "tie": 0.5, "right": 0.0}[comparison["choice"]]
        points[comparison["left"]].append(left)
        points[comparison["right"]].append(1 - left)
    scores = [sum(own) / len(own) if own else None for own in points]
    signals = item.row.get("signals")
    others = signals if isinstance(signals, dict) else {}
    return item.row | {"scores": scores, "signals": others | {BY_HAND: scores}, "comparisons": comparisons}
