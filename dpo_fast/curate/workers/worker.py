"""A process that judges answers, one at a time; `pool.py` starts it and kills it when it does not come back.

It must not import torch, which takes seconds. Before each call of a signal it writes into shared memory what it is at,
so that whoever has to kill it knows which answer is to blame.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_fast.config import SignalConfig
from dpo_fast.curate.sandbox.processes import adopt_orphans, end_with_parent, remove_tree
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Verdict, rank_worst_last, verdict_of

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

# A signal that limits its own time gets this much more before it is interrupted, and a process before it is killed.
OWN_LIMIT_GRACE = 2.0
KILL_GRACE = 5.0
_MIB = 2**20
# Of this process, beside what one answer may take.
_OWN_MEMORY_MIB = 512
_SECONDS_BESIDE = 60


@dataclass(frozen=True)
class Setup:
    """What a worker is told first.

    Attributes:
        config: settings, whose signals are all of text.
        parent: the process that started it.
        folder: for temporary files; nobody else uses it.
    """

    config: SignalConfig
    parent: int
    folder: Path


class Place(NamedTuple):
    """An answer of a row under a signal, all by number; -1 where it is at none of them."""

    row: int
    answer: int
    signal: int


@dataclass(frozen=True)
class Task:
    """A row to judge.

    Attributes:
        number: of the row.
        row: all its columns.
        answers: the texts.
        blamed: (answer, signal) -> why it is not tried again.
        is_suspect: a worker died with this row and others in hand, and it is not known at which.
    """

    number: int
    row: Row
    answers: list[str]
    blamed: dict[tuple[int, int], str] = field(default_factory=dict)
    is_suspect: bool = False


NOWHERE = Place(-1, -1, -1)


class Heartbeat:
    """Where a worker is and since when, in memory that the process which started it sees, too.

    The first word is odd while the others are written, so that nobody reads half of each.
    """

    SIZE = 5 * 8

    def __init__(self, descriptor: int) -> None:
        """Map a file of `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, self.SIZE)
        self._words = memoryview(self._memory).cast("q")

    def set(self, place: Place) -> None:
        """Say what is begun now."""
        words = self._words
        words[0] += 1
        words[1], words[2], words[3] = place
        words[4] = time.monotonic_ns()
        words[0] += 1

    def get(self) -> tuple[Place, float]:
        """The place, and the seconds since it was begun; `NOWHERE` while that is written."""
        before, *place, since = self._words.tolist()
        if before % 2 or self._words[0] != before:
            return NOWHERE, 0.0
        return Place(*place), (time.monotonic_ns() - since) / 1e9

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._memory.close()


class _TimeUp(BaseException):
    """Raised by the timer; no signal's `except Exception` holds it up."""


class _Stop(BaseException):
    """Raised by SIGTERM: the process that started this one is gone."""


def _raise(error: type[BaseException]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        raise error

    return handle


def main(connection_fd: int, heartbeat_fd: int) -> None:
    """Judge rows until the connection closes."""
    connection = Connection(connection_fd)
    heartbeat = Heartbeat(heartbeat_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _raise(_Stop))
    signal.signal(signal.SIGALRM, _raise(_TimeUp))
    setup: Setup = connection.recv()
    try:
        end_with_parent(setup.parent)
        adopt_orphans()
        worker = _Worker(setup.config, heartbeat)
        connection.send(None)
        while True:
            for task in connection.recv():
                connection.send((task.number, worker.judge(task)))
            connection.send(None)
    except (EOFError, OSError, _Stop):
        # The other side is done with this process, or gone, and then nobody else clears up.
        remove_tree(setup.folder)
        with suppress(OSError):
            setup.folder.parent.rmdir()


class _Worker:
    def __init__(self, config: SignalConfig, heartbeat: Heartbeat) -> None:
        self.signals = parse_signals(config)
        self.config = config
        self.heartbeat = heartbeat
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        # A user's own function may load what it likes.
        if not any(signal.spec.startswith("python:") for signal in self.signals):
            _set_soft_limit(resource.RLIMIT_DATA, (config.memory_limit_mib + _OWN_MEMORY_MIB) * _MIB)

    def judge(self, task: Task) -> list[list[Verdict]]:
        """For each signal, a verdict on each answer."""
        # Should the parent be killed while this process hangs where no handler runs, the kernel ends it.
        seconds = len(task.answers) * len(self.signals) * (self.config.timeout + KILL_GRACE) + _SECONDS_BESIDE
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_time = used.ru_utime + used.ru_stime + seconds * (os.cpu_count() or 1)
        _set_soft_limit(resource.RLIMIT_CPU, math.ceil(cpu_time))
        by_answer = [[self._verdict(task, a, s) for s in range(len(self.signals))] for a in range(len(task.answers))]
        self.heartbeat.set(NOWHERE)
        return [rank_worst_last([verdicts[s] for verdicts in by_answer]) for s in range(len(self.signals))]

    def _verdict(self, task: Task, answer: int, number: int) -> Verdict:
        if (answer, number) in task.blamed:
            return Verdict(None, task.blamed[answer, number])
        judge = self.signals[number]
        assert judge.of_text is not None
        grace = OWN_LIMIT_GRACE if judge.spec.startswith("command:") else 0.0
        self.heartbeat.set(Place(task.number, answer, number))
        try:
            signal.setitimer(signal.ITIMER_REAL, self.config.timeout + grace)
            try:
                return verdict_of(judge.of_text, task.answers[answer], task.row)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeUp:
            return Verdict(None, f"took longer than {self.config.timeout:g} s")


def _set_soft_limit(limit: int, value: int) -> None:
    highest = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))
