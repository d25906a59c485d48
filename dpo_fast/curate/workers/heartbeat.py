"""Which answer a worker is at and since when, in memory shared with the process that started it."""

from __future__ import annotations

import mmap
import time
from typing import NamedTuple


class Place(NamedTuple):
    """An answer of a row under a signal, each by number; -1 between answers."""

    row: int
    answer: int
    signal: int


NOWHERE = Place(-1, -1, -1)


class Heartbeat:
    """The place and the time at which it was entered.

    The first word is odd while the others are being written, so that nobody reads half of each.
    """

    SIZE = 5 * 8

    def __init__(self, descriptor: int) -> None:
        """Map a file of `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, self.SIZE)
        self._words = memoryview(self._memory).cast("q")

    def set(self, place: Place) -> None:
        """Enter a place."""
        words = self._words
        words[0] += 1
        words[1], words[2], words[3] = place
        words[4] = time.monotonic_ns()
        words[0] += 1

    def get(self) -> tuple[Place, float]:
        """The place, and the seconds since it was entered; `NOWHERE` while these are being written."""
        before, *place, since = self._words.tolist()
        if before % 2 or self._words[0] != before:
            return NOWHERE, 0.0
        return Place(*place), (time.monotonic_ns() - since) / 1e9

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._memory.close()
