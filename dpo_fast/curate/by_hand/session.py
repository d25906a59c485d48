"""One person's judgements of a queue of comparisons.

The current comparison is the first one without a judgement, which may lie behind others if the log was damaged. A
judgement is logged under its place in the queue; undoing it sets that entry to null.
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
# Key in the log: hashes of the results written from it that may be there, which a later one may replace.
WRITTEN = "written"


class StaleError(Exception):
    """A judgement of a comparison that is not the current one."""


def is_entry(key: str, value: Any, num_places: int) -> bool:
    """Whether a key with its result is an entry of the log of a queue of `num_places` comparisons."""
    if key == WRITTEN:
        return isinstance(value, str | list)
    is_judgement = value is None or (
        isinstance(value, dict)
        and value.keys() == {"choice", "seconds"}
        and value["choice"] in CHOICES
        and isinstance(value["seconds"], float)
    )
    return is_judgement and key in map(str, range(num_places))


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
        # In the order of judging, which undoing reverses.
        self._judged: dict[int, dict[str, Any]] = {
            int(key): value for key, value in log.results.items() if key != WRITTEN and value is not None
        }

    @property
    def place(self) -> int:
        """Place of the current comparison; the queue's length when all are judged."""
        open_places = (place for place in range(len(self._queue)) if not self._is_done(place))
        return next(open_places, len(self._queue))

    def _is_done(self, place: int) -> bool:
        return place in self._judged or self._is_left_out(place)

    def _is_left_out(self, place: int) -> bool:
        """Whether this is the repeat of a comparison that was skipped, and was not judged itself."""
        first = self._queue[place].first
        return place not in self._judged and first is not None and self._choice(first) == "skip"

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
            WriteError: the judgement could not be written and does not count.
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
            WriteError: the change could not be written, and the judgement still counts.
        """
        if not self._judged or place != self.place:
            raise StaleError
        last = next(reversed(self._judged))
        # Twice: a judgement that was taken back must not return because one line is damaged.
        self._log.add({str(last): None}, copies=2)
        del self._judged[last]
        self._shown_at = None

    def progress(self) -> Progress:
        """How much is done, and how well repeated judgements agree."""
        choices = [judgement["choice"] for judgement in self._judged.values()]
        agreements = [
            self._better(place) == self._better(comparison.first)
            for place, comparison in enumerate(self._queue)
            if comparison.first is not None and self._has_verdict(place) and self._has_verdict(comparison.first)
        ]
        total = sum(not self._is_left_out(place) for place in range(len(self._queue)))
        seconds = sum(judgement["seconds"] for judgement in self._judged.values())
        return Progress(len(choices), total, choices.count("skip"), len(agreements), sum(agreements), seconds)

    def _has_verdict(self, place: int) -> bool:
        return self._choice(place) not in (None, "skip")

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
