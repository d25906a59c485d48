"""Text signals in processes of their own: nothing that an answer does can hang or end this process.

A worker shows in shared memory which answer it is at. If that answer hangs or crashes the worker, the answer is marked,
and a new worker takes over the remaining rows.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from multiprocessing.connection import wait
from pathlib import Path

from dpo_fast.config import SignalConfig
from dpo_fast.curate.sandbox.processes import remove_tree
from dpo_fast.curate.signals.declare import TMPDIR_CURE
from dpo_fast.curate.signals.registry import Signal
from dpo_fast.curate.verdict import Question, Verdict, shorten
from dpo_fast.curate.workers.handle import Judged, WorkerDied, WorkerHandle
from dpo_fast.curate.workers.worker import Task
from dpo_fast.files import write_errors
from dpo_fast.machine import available_cores

_POLL = 0.25
_MAX_ROWS, _MAX_CHARACTERS = 64, 2**22
# With fewer calls of fast signals, a second worker costs more than it saves.
_CALLS_PER_WORKER = 2000
_MAX_UNEXPLAINED_DEATHS = 5


def judge_texts(questions: dict[int, Question], signals: Sequence[Signal], config: SignalConfig) -> Generator[Judged]:
    """Judge rows by text signals, in the order in which they finish.

    Args:
        questions: rows by number.
        signals: text signals only.
        config: their limits.

    Raises:
        RuntimeError: workers cannot be started, or keep dying for no cause that can be named.
        WriteError: there is no room for temporary files.
    """
    if not questions or not signals:
        return
    settings = {field.name: getattr(config, field.name) for field in fields(SignalConfig)}
    plain = SignalConfig(**settings | {"signals": [signal.spec for signal in signals], "signal_weights": None})
    tasks = [Task(number, q.row, q.answers) for number, q in questions.items()]
    with write_errors(Path(tempfile.gettempdir()), cure=TMPDIR_CURE):
        folder = Path(tempfile.mkdtemp(prefix="dpo-fast-label-")).resolve()
    pool = _Pool(plain, folder, _num_workers(tasks, signals, plain))
    try:
        yield from pool.judge(tasks)
    finally:
        pool.close()
        remove_tree(folder)


def _num_workers(tasks: list[Task], signals: Sequence[Signal], config: SignalConfig) -> int:
    most = config.num_workers or available_cores()
    num_answers = sum(len(task.answers) for task in tasks)
    if any(signal.declaration.is_slow for signal in signals):
        return max(1, min(most, num_answers))
    return max(1, min(most, num_answers * len(signals) // _CALLS_PER_WORKER))


class _Pool:
    def __init__(self, config: SignalConfig, folder: Path, size: int) -> None:
        self.config = config
        self.folder = folder
        self.size = size
        self.workers: list[WorkerHandle] = []
        self.started = 0
        self.unexplained_deaths = 0
        self.waiting: deque[Task] = deque()

    def judge(self, tasks: list[Task]) -> Iterator[Judged]:
        self.waiting.extend(tasks)
        most_rows = min(_MAX_ROWS, max(1, len(tasks) // (4 * self.size)))
        for _ in range(self.size):
            self._start()
        while self.waiting or any(worker.tasks for worker in self.workers):
            for worker in self.workers:
                while self.waiting and self._is_all_blamed(self.waiting[0]):
                    yield self._from_blame(self.waiting.popleft())
                if worker.is_idle and self.waiting:
                    worker.give(self._take(most_rows))
            yield from self._collect()

    def _is_all_blamed(self, task: Task) -> bool:
        """Whether every answer of a row is marked, so that no worker need see the row, which might kill it."""
        return bool(task.blamed) and len(task.blamed) == len(task.answers) * len(self.config.signals)

    def _from_blame(self, task: Task) -> Judged:
        signals, answers = range(len(self.config.signals)), range(len(task.answers))
        return task.number, [[Verdict(None, task.blamed[a, s]) for a in answers] for s in signals]

    def _collect(self) -> Iterator[Judged]:
        """What arrives within a moment; then replaces workers that died or hang."""
        by_connection = {worker.connection: worker for worker in self.workers}
        for ready in wait(list(by_connection), _POLL):
            worker = by_connection[ready]  # type: ignore[index]
            try:
                message = worker.receive()
            except WorkerDied as error:
                self._replace(worker, str(error))
                continue
            if message is not None:
                self.unexplained_deaths = 0
                yield message
        for worker in list(self.workers):
            if worker.is_stuck():
                self._replace(worker, f"took longer than {self.config.timeout:g} s and was killed")

    def _take(self, most_rows: int) -> list[Task]:
        """The next few tasks: fewer if the rows are large, one if it is suspect."""
        tasks = [self.waiting.popleft()]
        size = _size(tasks[0])
        while self.waiting and len(tasks) < most_rows and size < _MAX_CHARACTERS:
            if tasks[0].is_suspect or self.waiting[0].is_suspect:
                break
            tasks.append(self.waiting.popleft())
            size += _size(tasks[-1])
        return tasks

    def _start(self) -> None:
        self.workers.append(WorkerHandle(self.config, self.folder / f"worker-{self.started}"))
        self.started += 1

    def _replace(self, worker: WorkerHandle, reason: str) -> None:
        tasks, is_explained = worker.unfinished(shorten(reason))
        worker.end()
        self.workers.remove(worker)
        self.waiting.extendleft(reversed(tasks))
        if not is_explained:
            self.unexplained_deaths += 1
        if self.unexplained_deaths >= _MAX_UNEXPLAINED_DEATHS or not worker.is_ready:
            raise RuntimeError(f"a process that judges answers {reason}, and no answer is to blame")
        self._start()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()


def _size(task: Task) -> int:
    return sum(map(len, task.answers))
