"""`dpo-fast label`: answers in, the same rows with a score for each answer out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from dpo_fast.config import EvalConfig, LabelConfig, SignalConfig
from dpo_fast.console import progress_line, say
from dpo_fast.curate.rows import (
    Row,
    Rows,
    as_dataset,
    as_rows,
    check_out,
    read_objects,
    responses_of,
    tell_left_out,
    text_of,
    write_rows,
)
from dpo_fast.curate.signals.registry import Signal, parse_signals
from dpo_fast.curate.verdict import Question, Verdict
from dpo_fast.curate.workers.pool import judge_texts
from dpo_fast.curate.worklog import WorkLog, fingerprint
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# For each row and signal, a verdict on each answer.
Verdicts: TypeAlias = dict[int, dict[str, list[Verdict]]]

_ROWS_AT_ONCE = 8
_SECONDS_BETWEEN_SAVES = 1.0
# What changes no score; all else is part of what an interrupted run must have in common with the one that goes on.
_WITHOUT_EFFECT = ("num_workers", "judge_batch_size", "allow_commands", "signal_weights")


def run_label(config: LabelConfig, console: Console | None = None) -> Path:
    """`dpo-fast label`: write `config.out` and say what each signal found.

    Raises:
        UserError: a mistake in the settings or the rows.
    """
    console = console or Console()
    if config.by_hand or config.terminal:
        from dpo_fast.curate.by_hand import run_by_hand

        return run_by_hand(config, console=console)
    out = check_out(config.out, overwrite=config.overwrite)
    parse_signals(config)
    rows = read_objects(config.data, config.max_rows, console)
    with WorkLog(out, _fingerprint(rows, config), overwrite=config.overwrite) as log:
        labelled = label_rows(rows, config, console=console, log=log)
        write_rows(out, labelled)
        log.finish()
    say(console, f"{out}: {len(labelled)} rows")
    return out


def label(data: Rows, *, signals: str | list[str], console: Console | None = None, **settings: Any) -> Dataset:
    """Judge answers by signals.

    Args:
        data: rows with a list of answers: a file's name, a Hub name, a list of dicts or a `Dataset`.
        signals: name of a signal or a list of them; docs/signals.md describes all.
        console: where it says what it found; None prints.
        settings: fields of `LabelConfig`.

    Returns:
        The rows with `scores`, `signals`, and `signal_errors` where there are some; rows without answers are left out.

    Raises:
        UserError: an unknown setting or signal, or no usable row.
    """
    known = {field.name for field in fields(LabelConfig)} - {"data", "out", "by_hand", "terminal", "overwrite"}
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"label(): unknown setting {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    config = LabelConfig(signals=signals, **settings)
    console = console or Console()
    return as_dataset(label_rows(as_rows(data, console)[: config.max_rows], config, console=console))


def label_rows(
    rows: Sequence[Row], config: LabelConfig | EvalConfig, *, console: Console, log: WorkLog | None = None
) -> list[Row]:
    """Judge rows by the signals that a configuration names.

    A score is comparable with those of the same row, not with other rows'.

    Args:
        rows: with a list of answers each.
        config: signals, limits and names of columns.
        console: where the progress and a line for each signal go.
        log: of results that are there already, and where new ones are kept.

    Returns:
        The rows, in order, with `scores` (weighted sums of the signals, None where a signal has no score), `signals`
        (name -> scores) and, where there are some, `signal_errors` (name -> index of the answer -> reason). Rows
        without answers are left out, counted, and the first is named.

    Raises:
        UserError: the signals are wrong, or no row is usable.
    """
    signals = parse_signals(config)
    questions = _read_questions(rows, config, console)
    verdicts: Verdicts = {number: {} for number in questions}
    keep = _Keeper(verdicts, log)
    of_text = [signal for signal in signals if signal.of_text is not None]
    _judge_by_text(questions, of_text, config, keep, console)
    for signal in signals:
        if signal.of_rows is not None:
            _judge_by_rows(questions, signal, keep, console)
    for signal in signals:
        say(console, _summary(signal.spec, verdicts))
    return [rows[number] | _labels(rows[number], verdicts[number], signals) for number in questions]


def _read_questions(rows: Sequence[Row], config: LabelConfig | EvalConfig, console: Console) -> dict[int, Question]:
    """Rows by number; those without answers are left out, counted, and the first is named."""
    questions, broken = {}, []
    for number, row in enumerate(rows):
        try:
            answers = [text_of(answer) for answer in responses_of(row, config.responses_column, number)]
        except (UserError, AttributeError, TypeError) as error:
            is_ours = isinstance(error, UserError)
            broken.append(str(error) if is_ours else f"row {number}: an answer is neither a string nor messages")
            continue
        questions[number] = Question(row, row.get(config.prompt_column) or "", answers)
    tell_left_out(console, broken)
    if not questions:
        raise UserError(f"no row has answers: {broken[0] if broken else 'there are no rows'}")
    return questions


class _Keeper:
    """Puts verdicts in their places and, now and then, into the log."""

    def __init__(self, verdicts: Verdicts, log: WorkLog | None) -> None:
        self.verdicts = verdicts
        self.log = log
        self.unsaved: dict[str, Any] = {}
        self.saved_at = time.monotonic()

    def recall(self, numbers: Iterable[int], specs: Sequence[str]) -> list[int]:
        """Take what the log has; returns the numbers of the rows that it lacks."""
        missing = []
        for number in numbers:
            found = self.log.results.get(self._key(number, specs)) if self.log else None
            if found is None:
                missing.append(number)
            else:
                self._put(number, specs, [[Verdict(*pair) for pair in of_signal] for of_signal in found])
        return missing

    def add(self, number: int, specs: Sequence[str], verdicts: list[list[Verdict]]) -> None:
        """Keep what the signals say of a row: a list for each signal."""
        self._put(number, specs, verdicts)
        if self.log:
            self.unsaved[self._key(number, specs)] = verdicts
            if time.monotonic() - self.saved_at > _SECONDS_BETWEEN_SAVES:
                self.save()

    def save(self) -> None:
        """Bring all to the disk."""
        if self.log and self.unsaved:
            self.log.add(self.unsaved)
        self.unsaved = {}
        self.saved_at = time.monotonic()

    def _put(self, number: int, specs: Sequence[str], verdicts: list[list[Verdict]]) -> None:
        self.verdicts[number] |= zip(specs, verdicts, strict=True)

    def _key(self, number: int, specs: Sequence[str]) -> str:
        return json.dumps([number, *specs])


def _judge_by_text(
    questions: dict[int, Question],
    signals: list[Signal],
    config: SignalConfig,
    keep: _Keeper,
    console: Console,
) -> None:
    specs = [signal.spec for signal in signals]
    if not specs:
        return
    missing = keep.recall(questions, specs)
    judged = judge_texts({number: questions[number] for number in missing}, signals, config)
    for number, verdicts in _with_progress(judged, "label", questions, missing, console):
        keep.add(number, specs, verdicts)
    keep.save()


def _judge_by_rows(questions: dict[int, Question], signal: Signal, keep: _Keeper, console: Console) -> None:
    missing = keep.recall(questions, [signal.spec])
    judged = _judge_in_blocks(questions, signal, missing)
    for number, verdicts in _with_progress(judged, signal.spec[:40], questions, missing, console):
        keep.add(number, [signal.spec], verdicts)
    keep.save()


def _judge_in_blocks(
    questions: dict[int, Question], signal: Signal, missing: list[int]
) -> Iterator[tuple[int, list[list[Verdict]]]]:
    assert signal.of_rows is not None
    for start in range(0, len(missing), _ROWS_AT_ONCE):
        numbers = missing[start : start + _ROWS_AT_ONCE]
        for number, verdicts in zip(
            numbers, signal.of_rows.judge([questions[number] for number in numbers]), strict=True
        ):
            yield number, [verdicts]


def _with_progress(
    judged: Iterator[tuple[int, list[list[Verdict]]]],
    description: str,
    questions: dict[int, Question],
    missing: list[int],
    console: Console,
) -> Iterator[tuple[int, list[list[Verdict]]]]:
    """What comes, with a bar that counts answers."""
    total = sum(len(question.answers) for question in questions.values())
    done = total - sum(len(questions[number].answers) for number in missing)
    with progress_line(console, description, total, done) as line:
        for number, verdicts in judged:
            yield number, verdicts
            line.advance(len(questions[number].answers))


def _labels(row: Row, verdicts: dict[str, list[Verdict]], signals: list[Signal]) -> Row:
    """The columns that are new in a row; an older label's errors do not stay."""
    labels: Row = {
        "scores": [_sum(signals, of_answer) for of_answer in zip(*(verdicts[s.spec] for s in signals), strict=True)],
        "signals": {signal.spec: [verdict.score for verdict in verdicts[signal.spec]] for signal in signals},
    }
    errors = {
        spec: {str(index): verdict.reason for index, verdict in enumerate(of_signal) if verdict.reason is not None}
        for spec, of_signal in verdicts.items()
    }
    errors = {signal.spec: errors[signal.spec] for signal in signals if errors[signal.spec]}
    if errors or "signal_errors" in row:
        labels["signal_errors"] = errors
    return labels


def _sum(signals: list[Signal], verdicts: Sequence[Verdict]) -> float | None:
    """The weighted sum; None where a signal that counts has no score. One of weight 0 does not count."""
    total = 0.0
    for signal, verdict in zip(signals, verdicts, strict=True):
        if signal.weight == 0:
            continue
        if verdict.score is None:
            return None
        total += signal.weight * verdict.score
    # Numbers that JSON can hold, though the answers named some that are near the end of a float's range.
    return max(-sys.float_info.max, min(sys.float_info.max, total))


def _summary(spec: str, verdicts: Verdicts) -> str:
    """`json: mean 0.53 of 320 answers, 2 without a score (row 3, answer 1: took longer than 10 s)`."""
    found = [(n, i, verdict) for n, by_spec in verdicts.items() for i, verdict in enumerate(by_spec[spec])]
    scores = [verdict.score for _, _, verdict in found if verdict.score is not None]
    mean = f"mean {sum(score / len(scores) for score in scores):.4g}" if scores else "no score"
    text = f"{spec}: {mean} of {len(scores)} answers"
    unjudged = [(n, i, verdict.reason) for n, i, verdict in found if verdict.score is None]
    if unjudged:
        number, index, reason = unjudged[0]
        text += f", {len(unjudged)} without a score (row {number}, answer {index}: {reason})"
    return text


def _fingerprint(rows: list[Row], config: LabelConfig) -> str:
    """Of all that a score depends on, the contents of schemas among it."""
    settings = {field.name: getattr(config, field.name) for field in fields(SignalConfig)}
    for name in _WITHOUT_EFFECT:
        del settings[name]
    specs = [config.signals] if isinstance(config.signals, str) else config.signals
    schemas = [Path(spec.partition(":")[2]).read_text() for spec in specs if spec.startswith("json_schema:")]
    return fingerprint(settings, schemas, config.prompt_column, config.responses_column, rows)
