"""Rows -> a verdict of each signal on each answer, those that a log holds already included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeAlias

from rich.console import Console

from dpo_fast.config import SignalConfig
from dpo_fast.console import progress_line
from dpo_fast.curate.engines.parallel import resumable
from dpo_fast.curate.signals.registry import Signal
from dpo_fast.curate.signals.served import ServedSignal
from dpo_fast.curate.verdict import Question, Verdict
from dpo_fast.curate.workers.pool import judge_texts
from dpo_fast.curate.worklog import WorkLog

# For each row and signal, a verdict on each answer.
Verdicts: TypeAlias = dict[int, dict[str, list[Verdict]]]

_ROWS_AT_ONCE = 8
_SECONDS_BETWEEN_SAVES = 1.0


def judge_rows(
    questions: dict[int, Question], signals: list[Signal], config: SignalConfig, log: WorkLog | None, console: Console
) -> Verdicts:
    """What the signals say about the rows.

    Args:
        questions: rows by number.
        signals: what judges them: text signals all at once in worker processes, then row signals one after another.
        config: limits of the text signals.
        log: results so far; new ones are added about once a second.
        console: shows the progress.
    """
    keeper = _Keeper({number: {} for number in questions}, log)
    text_signals = [signal for signal in signals if signal.of_text is not None]
    if text_signals:
        specs = [signal.spec for signal in text_signals]
        missing = keeper.recall(questions, specs)
        # Closed at once when a signal or a full disk ends the run, and with it the worker processes.
        with closing(judge_texts({number: questions[number] for number in missing}, text_signals, config)) as judged:
            keeper.add_all(specs, _with_progress(judged, "label", questions, missing, console))
    for signal in signals:
        if isinstance(signal.of_rows, ServedSignal):
            # Its replies are in the log, one by one; the verdicts follow from them.
            served = ((number, [of_row]) for number, of_row in signal.of_rows.judge(questions, log))
            with resumable(log):
                keeper.add_all(
                    [signal.spec], _with_progress(served, signal.spec[:40], questions, [*questions], console)
                )
        elif signal.of_rows is not None:
            missing = keeper.recall(questions, [signal.spec])
            blocks = _judge_in_blocks(questions, signal, missing)
            keeper.add_all([signal.spec], _with_progress(blocks, signal.spec[:40], questions, missing, console))
    return keeper.verdicts


class _Keeper:
    """Keeps verdicts in memory and, from time to time, in the log."""

    def __init__(self, verdicts: Verdicts, log: WorkLog | None) -> None:
        self.verdicts = verdicts
        self.log = log
        self.unsaved: dict[str, Any] = {}
        self.saved_at = time.monotonic()

    def recall(self, numbers: Iterable[int], specs: Sequence[str]) -> list[int]:
        """Take what the log holds; returns the numbers of the rows that it lacks."""
        missing = []
        for number in numbers:
            found = self.log.results.get(self._key(number, specs)) if self.log else None
            if found is None:
                missing.append(number)
            else:
                self._put(number, specs, [[Verdict(*pair) for pair in of_signal] for of_signal in found])
        return missing

    def add_all(self, specs: Sequence[str], judged: Iterable[tuple[int, list[list[Verdict]]]]) -> None:
        """Keep the verdicts of rows as they come, a list for each of the signals."""
        for number, verdicts in judged:
            self._put(number, specs, verdicts)
            self.unsaved[self._key(number, specs)] = verdicts
            if time.monotonic() - self.saved_at > _SECONDS_BETWEEN_SAVES:
                self._save()
        self._save()

    def _save(self) -> None:
        if self.log and self.unsaved:
            self.log.add(self.unsaved)
        self.unsaved = {}
        self.saved_at = time.monotonic()

    def _put(self, number: int, specs: Sequence[str], verdicts: list[list[Verdict]]) -> None:
        self.verdicts[number] |= zip(specs, verdicts, strict=True)

    def _key(self, number: int, specs: Sequence[str]) -> str:
        return json.dumps([number, *specs])


def _judge_in_blocks(
    questions: dict[int, Question], signal: Signal, missing: list[int]
) -> Iterator[tuple[int, list[list[Verdict]]]]:
    assert signal.of_rows is not None
    assert not isinstance(signal.of_rows, ServedSignal)
    for start in range(0, len(missing), _ROWS_AT_ONCE):
        numbers = missing[start : start + _ROWS_AT_ONCE]
        verdicts = signal.of_rows.judge([questions[number] for number in numbers])
        yield from ((number, [of_row]) for number, of_row in zip(numbers, verdicts, strict=True))


def _with_progress(
    judged: Iterator[tuple[int, list[list[Verdict]]]],
    description: str,
    questions: dict[int, Question],
    missing: list[int],
    console: Console,
) -> Iterator[tuple[int, list[list[Verdict]]]]:
    """The same rows, with a bar that counts answers."""
    total = sum(len(question.answers) for question in questions.values())
    done = total - sum(len(questions[number].answers) for number in missing)
    with progress_line(console, description, total, done) as line:
        for number, verdicts in judged:
            yield number, verdicts
            line.advance(len(questions[number].answers))
