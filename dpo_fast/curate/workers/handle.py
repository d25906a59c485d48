"""A worker process, seen from the process that started it.

Workers are fresh interpreters that import what judging needs (0.1 s), not copies of this process: a fork would copy
torch with its threads, and multiprocessing's other start methods run the user's script again in every worker. Each
worker has its own pipe, so killing one leaves no lock behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeAlias

from dpo_fast.config import SignalConfig
from dpo_fast.curate.sandbox.processes import end_those_in, end_tree, remove_tree
from dpo_fast.curate.signals.declare import KILL_GRACE, TMPDIR_CURE
from dpo_fast.curate.verdict import Verdict
from dpo_fast.curate.workers.heartbeat import NOWHERE, Heartbeat
from dpo_fast.curate.workers.worker import Setup, Task
from dpo_fast.errors import WriteError
from dpo_fast.files import write_errors

# (number of a row, for each signal a verdict on each of its answers)
Judged: TypeAlias = tuple[int, list[list[Verdict]]]

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from dpo_fast.curate.workers.worker import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


class WorkerDied(Exception):
    """A worker is gone; the message says how it ended."""


class WorkerHandle:
    """One worker.

    Attributes:
        connection: where its messages arrive.
        tasks: what it was given and has not judged yet, by row number.
        is_idle: whether it waits for tasks.
        is_ready: whether it has come up.
    """

    def __init__(self, config: SignalConfig, folder: Path) -> None:
        self.folder = folder
        self.config = config
        self.tasks: dict[int, Task] = {}
        self.is_idle = False
        self.is_ready = False
        with _shared_memory(folder) as shared:
            ours, theirs = socket.socketpair()
            self._heartbeat = Heartbeat(shared.fileno())
            self._heartbeat.set(NOWHERE)
            descriptors = (theirs.fileno(), shared.fileno())
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *map(str, descriptors), json.dumps(sys.path)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    # There are as many workers as processors: threads in a user's function should not multiply them.
                    env={"OMP_NUM_THREADS": "1"} | os.environ | {"TMPDIR": str(folder)},
                )
        self.connection = Connection(ours.detach())
        self._send(Setup(config, os.getpid(), folder))

    def give(self, tasks: list[Task]) -> None:
        """Hand it rows."""
        self.tasks = {task.number: task for task in tasks}
        self.is_idle = False
        self._send(tasks)

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it died; `receive` reports that
            self.connection.send(message)

    def receive(self) -> Judged | None:
        """A row's verdicts, or None if the worker is done with what it was given.

        Raises:
            WorkerDied: it is gone.
            WriteError: there is no room for its temporary files.
        """
        try:
            message: Judged | WriteError | None = self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(_how_it_ended(self._process.wait())) from error
        if isinstance(message, WriteError):
            raise message
        if message is None:
            self.is_ready = self.is_idle = True
        else:
            del self.tasks[message[0]]
        return message

    def is_stuck(self) -> bool:
        """Whether it has been at one answer for too long. If so, it is left stopped, to be ended."""
        # What it has sent in the meantime comes first: it may be well past that answer.
        if not self._is_overdue() or self.connection.poll():
            return False
        self._process.send_signal(signal.SIGSTOP)
        if self._is_overdue():
            return True
        self._process.send_signal(signal.SIGCONT)
        return False

    def _is_overdue(self) -> bool:
        place, seconds = self._heartbeat.get()
        return place != NOWHERE and seconds > self.config.timeout + KILL_GRACE

    def end(self) -> None:
        """Kill it with everything that it started."""
        died_itself = self._process.poll() is not None
        end_tree(self._process)
        if died_itself:
            end_those_in(self.folder)
        self.connection.close()
        self._heartbeat.close()
        remove_tree(self.folder)

    def unfinished(self, reason: str) -> tuple[list[Task], bool]:
        """The tasks that it leaves behind, and whether the guilty answer is known, which is then marked.

        Call it before `end`. If it died between two answers, its rows are suspect and are retried one by one; a row
        that kills a worker on its own is guilty as a whole.
        """
        place, _ = self._heartbeat.get()
        tasks = list(self.tasks.values())
        if place.row in self.tasks:
            guilty = self.tasks[place.row]
            marked = replace(guilty, blamed=guilty.blamed | {(place.answer, place.signal): reason})
            return [marked if task is guilty else task for task in tasks], True
        if len(tasks) == 1 and tasks[0].is_suspect:
            cells = product(range(len(tasks[0].answers)), range(len(self.config.signals)))
            return [replace(tasks[0], blamed=dict.fromkeys(cells, reason))], True
        return [replace(task, is_suspect=True) for task in tasks], False


@contextmanager
def _shared_memory(folder: Path) -> Iterator[IO[bytes]]:
    """Make a worker's folder, and a file for its heartbeat."""
    with write_errors(folder, cure=TMPDIR_CURE):
        folder.mkdir()
        shared = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    with shared:
        with write_errors(folder, cure=TMPDIR_CURE):
            # Not truncated to its size: where the disk is full, the first access to such memory kills the process.
            shared.write(bytes(Heartbeat.SIZE))
        yield shared


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended the process that judged it (exit code {status})"
    return f"ended the process that judged it (signal {-status}, {signal.strsignal(-status)})"
