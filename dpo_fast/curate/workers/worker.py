"""A process that judges answers one at a time; `pool` starts it, and kills it if it does not come back.

It must not import torch, which takes seconds. Before each call of a signal it enters the answer in its heartbeat, so
that whoever has to kill it knows which answer is to blame.
"""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.sandbox.processes import adopt_orphans, end_with_parent, remove_tree
from dpo_fast.curate.signals.declare import KILL_GRACE
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Verdict, rank_worst_last, verdict_of
from dpo_fast.curate.workers.heartbeat import NOWHERE, Heartbeat, Place
from dpo_fast.errors import WriteError

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

_MIB = 2**20
# What this process needs for itself, on top of what one answer may take.
_OWN_MEMORY_MIB = 512
_OWN_SECONDS = 60


@dataclass(frozen=True)
class Setup:
    """The first message to a worker.

    Attributes:
        config: settings, whose signals are all text signals.
        parent: the process that started it.
        folder: for temporary files; nobody else uses it.
    """

    config: SignalConfig
    parent: int
    folder: Path


@dataclass(frozen=True)
class Task:
    """A row to judge.

    Attributes:
        number: of the row.
        row: all its columns.
        answers: the texts.
        blamed: (answer, signal) -> why it is not tried again.
        is_suspect: a worker died holding this row and others, and it is not known which one killed it.
    """

    number: int
    row: Row
    answers: list[str]
    blamed: dict[tuple[int, int], str] = field(default_factory=dict)
    is_suspect: bool = False


class _TimeUp(BaseException):
    """Raised by the timer; no signal's `except Exception` catches it."""


class _Stop(BaseException):
    """Raised by SIGTERM: the parent is gone."""


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
    except WriteError as error:
        connection.send(error)
    except (EOFError, OSError, _Stop):
        # The parent is done with this process, or dead, in which case nobody else cleans up.
        remove_tree(setup.folder)
        with suppress(OSError):
            setup.folder.parent.rmdir()


class _Worker:
    def __init__(self, config: SignalConfig, heartbeat: Heartbeat) -> None:
        self.signals = parse_signals(config)
        self.config = config
        self.heartbeat = heartbeat
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if all(signal.declaration.limits.memory for signal in self.signals):
            _set_soft_limit(resource.RLIMIT_DATA, (config.memory_limit_mib + _OWN_MEMORY_MIB) * _MIB)

    def judge(self, task: Task) -> list[list[Verdict]]:
        """For each signal, a verdict on each answer."""
        # If the parent is killed while this process hangs where no handler runs, the kernel ends it.
        seconds = len(task.answers) * len(self.signals) * (self.config.timeout + KILL_GRACE) + _OWN_SECONDS
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
        self.heartbeat.set(Place(task.number, answer, number))
        try:
            signal.setitimer(signal.ITIMER_REAL, self.config.timeout + judge.declaration.limits.timeout_grace)
            try:
                return verdict_of(judge.of_text, task.answers[answer], task.row)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeUp:
            return Verdict(None, f"took longer than {self.config.timeout:g} s")


def _set_soft_limit(limit: int, value: int) -> None:
    highest = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))
