"""Many requests in flight; their results in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from dpo_fast.curate.engines.servers import EngineError
from dpo_fast.curate.worklog import WorkLog

J = TypeVar("J")
R = TypeVar("R")


class Log(Protocol):
    """Where results are kept as they arrive: the part of a `WorkLog` that is needed for that."""

    results: dict[str, Any]

    def add(self, results: dict[str, Any]) -> None:
        """Keep results; from here on they survive a kill."""


@contextmanager
def resumable(log: Log | None) -> Iterator[None]:
    """Say with a failure of servers where their answers are kept."""
    try:
        yield
    except EngineError as error:
        if not isinstance(log, WorkLog):
            raise
        kept = f"{len(log.results)} results are kept in {log.path}: rerun the same command to resume"
        raise EngineError(f"{error}; {kept}") from error


def in_parallel(
    jobs: Iterable[J], work: Callable[[J], R], limit: int, again: deque[J] | None = None
) -> Iterator[list[tuple[J, R]]]:
    """Results as they arrive, in lists of those that are ready.

    A job counts as in flight until the caller asks for the next list, that is until its result is saved: if the process
    is killed at any moment, at most `limit` jobs have to be repeated. On a failure the results that have arrived come
    first. The threads are daemons: they hold up neither Ctrl-C nor an error.

    Args:
        jobs: taken when there is room for one.
        work: called in a thread.
        limit: jobs in flight at once.
        again: jobs that the caller adds while it runs; they come before the others.

    Raises:
        Exception: what `work` raised.
    """
    again = deque() if again is None else again
    source = iter(jobs)
    todo: SimpleQueue[list[J]] = SimpleQueue()
    done: SimpleQueue[tuple[J, R | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        for (job,) in iter(todo.get, []):
            try:
                done.put((job, work(job), None))
            except BaseException as error:
                done.put((job, None, error))

    threads: list[threading.Thread] = []
    in_flight = 0
    try:
        while True:
            while in_flight < limit and (job := [again.popleft()] if again else _next(source)):
                if len(threads) <= in_flight:
                    threads.append(threading.Thread(target=run, daemon=True))
                    threads[-1].start()
                todo.put(job)
                in_flight += 1
            if not in_flight:
                return
            arrived = [done.get()]
            while not done.empty():
                arrived.append(done.get())
            if results := [(job, result) for job, result, error in arrived if error is None]:
                yield results  # type: ignore[misc]
            for _, _, error in arrived:
                if error is not None:
                    raise error
            in_flight -= len(arrived)
    finally:
        for _ in threads:
            todo.put([])


def _next(source: Iterator[J]) -> list[J]:
    """The next job in a list, or an empty list."""
    for job in source:
        return [job]
    return []
