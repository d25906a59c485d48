"""Text signals in processes of their own: nothing that an answer does can hang or end this one.

The workers are plain interpreters that import what judging needs (0.1 s), not copies of this process: a fork would copy
a torch with its threads, and multiprocessing's other ways run the user's script anew in every worker. Each worker has a
pipe of its own, so that killing one leaves no lock behind, and shows in shared memory which answer it is at, so that
the one that hung or crashed it is known at once; it is marked, and the rest of its rows go to a new worker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeAlias

from dpo_fast.config import SignalConfig
from dpo_fast.curate.sandbox.processes import end_those_in, end_tree, remove_tree
from dpo_fast.curate.signals.registry import Signal
from dpo_fast.curate.verdict import Question, Verdict, shorten
from dpo_fast.curate.workers.worker import KILL_GRACE, NOWHERE, Heartbeat, Setup, Task

# (number of a row, for each signal a verdict on each of its answers)
Judged: TypeAlias = tuple[int, list[list[Verdict]]]

_POLL = 0.25
_MAX_ROWS, _MAX_CHARACTERS = 64, 2**22
# Below this many calls of cheap signals a second worker costs more than it saves.
_CALLS_PER_WORKER = 2000
_MAX_DEATHS_WITHOUT_CAUSE = 5
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from dpo_fast.curate.workers.worker import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


def judge_texts(questions: dict[int, Question], signals: Sequence[Signal], config: SignalConfig) -> Iterator[Judged]:
    """Judge rows by text signals, in the order in which they are done.

    Args:
        questions: rows by number.
        signals: all of them of text.
        config: their limits.

    Raises:
        RuntimeError: workers cannot be started, or die again and again for no cause that can be named.
    """
    if not questions or not signals:
        return
    settings = {field.name: getattr(config, field.name) for field in fields(SignalConfig)}
    plain = SignalConfig(**settings | {"signals": [signal.spec for signal in signals], "signal_weights": None})
    tasks = [Task(number, q.row, q.answers) for number, q in questions.items()]
    folder = Path(tempfile.mkdtemp(prefix="dpo-fast-label-")).resolve()
    pool = _Pool(plain, folder, _num_workers(tasks, plain))
    try:
        yield from pool.judge(tasks)
    finally:
        pool.close()
        remove_tree(folder)


def _num_workers(tasks: list[Task], config: SignalConfig) -> int:
    most = config.num_workers or _num_processors()
    num_answers = sum(len(task.answers) for task in tasks)
    if any(spec.startswith(("command:", "python:")) for spec in config.signals):
        return max(1, min(most, num_answers))
    return max(1, min(most, num_answers * len(config.signals) // _CALLS_PER_WORKER))


def _num_processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Died(Exception):
    """A worker is gone."""


class _Worker:
    """A worker process, seen from here.

    Attributes:
        connection: where it answers.
        tasks: what it was given and has not judged yet, by the rows' numbers.
        is_idle: whether it waits for tasks.
    """

    def __init__(self, config: SignalConfig, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.config = config
        self.tasks: dict[int, Task] = {}
        self.is_idle = False
        self.is_ready = False
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as shared, theirs:
            shared.truncate(Heartbeat.SIZE)
            self.heartbeat = Heartbeat(shared.fileno())
            self.heartbeat.set(NOWHERE)
            descriptors = (theirs.fileno(), shared.fileno())
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, descriptors), json.dumps(sys.path)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                # As many workers as processors: a user's function that uses threads should not multiply them.
                env={"OMP_NUM_THREADS": "1"} | os.environ | {"TMPDIR": str(folder)},
            )
        self.connection = Connection(ours.detach())
        self._send(Setup(config, os.getpid(), folder))

    def give(self, tasks: list[Task]) -> None:
        self.tasks = {task.number: task for task in tasks}
        self.is_idle = False
        self._send(tasks)

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it died; `receive` will say so
            self.connection.send(message)

    def receive(self) -> Judged | None:
        """A row's verdicts, or None where the worker is done with what it was given.

        Raises:
            _Died: it is gone.
        """
        try:
            message: Judged | None = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _Died from error
        if message is None:
            self.is_ready = self.is_idle = True
        else:
            del self.tasks[message[0]]
        return message

    def is_stuck(self) -> bool:
        place, seconds = self.heartbeat.get()
        return place != NOWHERE and seconds > self.config.timeout + KILL_GRACE

    def end(self) -> None:
        """Kill it with all that it started."""
        died_itself = self.process.poll() is not None
        end_tree(self.process)
        if died_itself:
            end_those_in(self.folder)
        self.connection.close()
        self.heartbeat.close()
        remove_tree(self.folder)

    def unfinished(self, reason: str) -> tuple[list[Task], bool]:
        """The tasks that it leaves behind, and whether the guilty answer is known, which is marked then.

        To be called before `end`. Where it died between two answers, its rows are suspect and tried one by one; one
        that kills a worker alone is guilty as a whole.
        """
        place, _ = self.heartbeat.get()
        tasks = list(self.tasks.values())
        if place.row in self.tasks:
            guilty = self.tasks[place.row]
            marked = replace(guilty, blamed=guilty.blamed | {(place.answer, place.signal): reason})
            return [marked if task is guilty else task for task in tasks], True
        if len(tasks) == 1 and tasks[0].is_suspect:
            cells = product(range(len(tasks[0].answers)), range(len(self.config.signals)))
            return [replace(tasks[0], blamed=dict.fromkeys(cells, reason))], True
        return [replace(task, is_suspect=True) for task in tasks], False


class _Pool:
    def __init__(self, config: SignalConfig, folder: Path, size: int) -> None:
        self.config = config
        self.folder = folder
        self.size = size
        self.workers: list[_Worker] = []
        self.started = 0
        self.deaths_without_cause = 0
        self.waiting: deque[Task] = deque()

    def judge(self, tasks: list[Task]) -> Iterator[Judged]:
        self.waiting.extend(tasks)
        most_rows = min(_MAX_ROWS, max(1, len(tasks) // (4 * self.size)))
        for _ in range(self.size):
            self._start()
        while self.waiting or any(worker.tasks for worker in self.workers):
            for worker in self.workers:
                while self.waiting and self._is_settled(self.waiting[0]):
                    yield self._from_marks(self.waiting.popleft())
                if worker.is_idle and self.waiting:
                    worker.give(self._take(most_rows))
            yield from self._collect()

    def _is_settled(self, task: Task) -> bool:
        """Whether all of a row is marked, so that no worker need see it, which might kill that one, too."""
        return bool(task.blamed) and len(task.blamed) == len(task.answers) * len(self.config.signals)

    def _from_marks(self, task: Task) -> Judged:
        signals, answers = range(len(self.config.signals)), range(len(task.answers))
        return task.number, [[Verdict(None, task.blamed[a, s]) for a in answers] for s in signals]

    def _collect(self) -> Iterator[Judged]:
        """What comes in a moment; then the dead and the stuck are replaced."""
        by_connection = {worker.connection: worker for worker in self.workers}
        for ready in wait(list(by_connection), _POLL):
            worker = by_connection[ready]  # type: ignore[index]
            try:
                message = worker.receive()
            except _Died:
                worker.process.wait()
                self._replace(worker, _last_words(worker.process.returncode))
                continue
            if message is not None:
                self.deaths_without_cause = 0
                yield message
        for worker in list(self.workers):
            # What it has sent meanwhile comes first: it may long be further.
            if worker.is_stuck() and not worker.connection.poll():
                worker.process.send_signal(signal.SIGSTOP)
                if worker.is_stuck():
                    self._replace(worker, f"took longer than {self.config.timeout:g} s and was killed")
                else:
                    worker.process.send_signal(signal.SIGCONT)

    def _take(self, most_rows: int) -> list[Task]:
        """The next few tasks; fewer where the rows are large, one where it is suspect."""
        tasks = [self.waiting.popleft()]
        size = _size(tasks[0])
        while self.waiting and len(tasks) < most_rows and size < _MAX_CHARACTERS:
            if tasks[0].is_suspect or self.waiting[0].is_suspect:
                break
            tasks.append(self.waiting.popleft())
            size += _size(tasks[-1])
        return tasks

    def _start(self) -> None:
        self.workers.append(_Worker(self.config, self.folder / f"worker-{self.started}"))
        self.started += 1

    def _replace(self, worker: _Worker, reason: str) -> None:
        tasks, is_known = worker.unfinished(shorten(reason))
        worker.end()
        self.workers.remove(worker)
        self.waiting.extendleft(reversed(tasks))
        if not is_known:
            self.deaths_without_cause += 1
        if self.deaths_without_cause >= _MAX_DEATHS_WITHOUT_CAUSE or not worker.is_ready:
            raise RuntimeError(f"a process that judges answers {reason}, and no answer is to blame")
        self._start()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()


def _size(task: Task) -> int:
    return sum(map(len, task.answers))


def _last_words(status: int) -> str:
    if status >= 0:
        return f"ended the process that judged it (exit code {status})"
    return f"ended the process that judged it (signal {-status}, {signal.strsignal(-status)})"
