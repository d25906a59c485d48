"""One person's judgements of a queue of comparisons.

Judgements are made in the order of the queue, so the last one made is always the furthest along. A judgement is logged
under its place in the queue; undoing it sets that entry to null.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpo_fast.curate.by_hand.comparisons import Comparison
from dpo_fast.curate.by_hand.items import Item
from dpo_fast.curate.rows import Row
from dpo_fast.curate.worklog import WorkLog

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
BY_HAND = "by_hand"


class StaleError(Exception):
    """A judgement of a comparison that is not the current one."""


@dataclass(frozen=True)
class Progress:
    """How far a person has come.

    Attributes:
        done: comparisons judged or skipped.
        total: comparisons to show.
        skipped: how many of those done were skipped.
        repeated: comparisons judged twice.
        agreed: how many of these were judged the same both times.
        seconds: total time between showing and judging.
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


class JudgingSession:
    """The queue, a person's place in it and their judgements; each is on disk before the next comparison is shown."""

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
        """Place of the current comparison; the queue's length when all are judged."""
        place = next(reversed(self._judged), -1) + 1
        while place < len(self._queue) and self._is_left_out(self._queue[place]):
            place += 1
        return place

    def _is_left_out(self, comparison: Comparison) -> bool:
        """Whether this is the repeat of a comparison that was skipped."""
        return comparison.first is not None and self._choice(comparison.first) == "skip"

    def _choice(self, place: int) -> Choice | None:
        return self._judged[place]["choice"] if place in self._judged else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to judge."""
        return self.place == len(self._queue)

    @property
    def can_undo(self) -> bool:
        """Whether there is a judgement to undo."""
        return bool(self._judged)

    def show(self) -> tuple[Item, str, str] | None:
        """The current row and the texts of its left and right answer; None when all are judged. Starts the clock."""
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
            place: of the comparison that was judged.
            choice: which answer is better.

        Raises:
            StaleError: it is not the current comparison.
            OSError: the judgement could not be written and does not count.
        """
        if self.is_finished or place != self.place:
            raise StaleError
        seconds = 0.0 if self._shown_at is None else self._clock() - self._shown_at
        judgement = {"choice": choice, "seconds": round(seconds, 2)}
        self._log.add({str(place): judgement})
        self._judged[place] = judgement
        self._shown_at = None

    def undo(self, place: int) -> None:
        """Undo the last judgement, which makes its comparison the current one.

        Args:
            place: of the comparison that the caller takes for the current one.

        Raises:
            StaleError: it is not, or there is no judgement.
            OSError: the change could not be written, and the judgement still counts.
        """
        if not self._judged or place != self.place:
            raise StaleError
        last = next(reversed(self._judged))
        self._log.add({str(last): None})
        del self._judged[last]
        self._shown_at = None

    def progress(self) -> Progress:
        """How much is done, and how well repeated judgements agree."""
        choices = [judgement["choice"] for judgement in self._judged.values()]
        agreements = [
            self._better(place) == self._better(comparison.first)
            for place, comparison in enumerate(self._queue)
            if comparison.first is not None and self._choice(place) not in (None, "skip")
        ]
        total = sum(not self._is_left_out(comparison) for comparison in self._queue)
        seconds = sum(judgement["seconds"] for judgement in self._judged.values())
        return Progress(len(choices), total, choices.count("skip"), len(agreements), sum(agreements), seconds)

    def _better(self, place: int) -> int | None:
        """Index of the preferred answer; None for a tie."""
        comparison = self._queue[place]
        return {"left": comparison.left, "right": comparison.right}.get(self._judged[place]["choice"])

    def rows(self) -> list[Row]:
        """The rows with what was judged.

        Returns:
            Each row with `scores` (for each answer the share of its comparisons that it won, a tie counting half; null
            if it has none), the same as the signal `by_hand`, and `comparisons` in the order of judging.
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
