"""`dpo-fast label`: rows with answers in, the same rows with a score for each answer out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dpo_fast.config import EvalConfig, LabelConfig, SignalConfig
from dpo_fast.console import say
from dpo_fast.curate.engines.servers import NEUTRAL_SETTINGS
from dpo_fast.curate.identity import versions
from dpo_fast.curate.judge_rows import Verdicts, judge_rows
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.rows import (
    Row,
    Rows,
    as_dataset,
    as_rows,
    check_out,
    hold_output,
    read_objects,
    report_dropped,
    responses_of,
    write_rows,
)
from dpo_fast.curate.signals.models import ModelSignal
from dpo_fast.curate.signals.registry import Signal, parse_signals
from dpo_fast.curate.signals.served import ServedSignal
from dpo_fast.curate.stopping import exit_on_signals
from dpo_fast.curate.verdict import Question, Verdict
from dpo_fast.curate.worklog import WorkLog
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Settings that change no verdict; all others must match for an interrupted run to be resumed.
_WITHOUT_EFFECT = ("num_workers", "judge_batch_size", "allow_commands", "signal_weights", *NEUTRAL_SETTINGS)


def run_label(config: LabelConfig, console: Console | None = None) -> Path:
    """`dpo-fast label`: write `config.out` and summarize each signal.

    Raises:
        UserError: a mistake in the settings or the rows.
    """
    console = console or Console()
    if config.by_hand or config.terminal:
        from dpo_fast.curate.by_hand import run_by_hand

        return run_by_hand(config, console=console)
    return _run_signals(config, console)


@exit_on_signals(resumable=True)
def _run_signals(config: LabelConfig, console: Console) -> Path:
    out = check_out(config.out, overwrite=config.overwrite)
    signals = parse_signals(config)
    rows = read_objects(config.data, config.max_rows, console)
    if config.dry_run:
        _say_estimates(signals, list(_read_questions(rows, config, console).values()), console)
        return out
    depends_on = _depends_on(rows, signals, config)
    with hold_output(out), WorkLog(out, depends_on, overwrite=config.overwrite) as log:
        labelled = label_rows(rows, config, console=console, log=log)
        write_rows(out, labelled)
        log.finish()
    say(console, f"{out}: {len(labelled)} rows")
    return out


def label(data: Rows, *, signals: str | list[str], console: Console | None = None, **settings: Any) -> Dataset:
    """Judge answers by signals.

    Args:
        data: rows with a list of answers: a file name, a Hub name, a list of dicts or a `Dataset`.
        signals: a signal or a list of them; docs/signals.md describes all.
        console: where progress and summaries are printed; None prints to standard output.
        settings: fields of `LabelConfig`.

    Returns:
        The rows with `scores`, `signals` and, if there are any, `signal_errors`; rows without answers are dropped.

    Raises:
        UserError: an unknown setting or signal, or no usable rows.
    """
    of_the_command = {"data", "out", "by_hand", "terminal", "overwrite", "dry_run"}
    known = {field.name for field in fields(LabelConfig)} - of_the_command
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"label(): unknown setting {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    config = LabelConfig(signals=signals, **settings)
    console = console or Console()
    return as_dataset(label_rows(as_rows(data, console)[: config.max_rows], config, console=console))


def label_rows(
    rows: Sequence[Row], config: LabelConfig | EvalConfig, *, console: Console, log: WorkLog | None = None
) -> list[Row]:
    """Judge rows by the signals that a configuration names.

    A score is comparable within its row, not across rows.

    Args:
        rows: with a list of answers each.
        config: signals, limits and names of columns.
        console: shows progress and one line per signal.
        log: results so far, to which new ones are added.

    Returns:
        The rows, in order, with `scores` (weighted sums of the signals, None if a signal has no score), `signals`
        (name -> scores) and, if there are any, `signal_errors` (name -> index of the answer -> reason). Rows without
        answers are dropped and counted, and the first is named.

    Raises:
        UserError: a signal is wrong, or no row is usable.
    """
    signals = parse_signals(config)
    questions = _read_questions(rows, config, console)
    verdicts = judge_rows(questions, signals, config, log, console)
    for signal in signals:
        say(console, _summary(signal.spec, verdicts))
        if isinstance(signal.of_rows, ServedSignal):
            say(console, f"{signal.spec}: {signal.of_rows.summary()}")
    return [rows[number] | _labels(rows[number], verdicts[number], signals) for number in questions]


def _say_estimates(signals: list[Signal], questions: list[Question], console: Console) -> None:
    """What signals on servers would be sent."""
    for signal in signals:
        of_rows = signal.of_rows
        cost = of_rows.estimate(questions) if isinstance(of_rows, ServedSignal) else "sends no requests"
        say(console, f"dry run: {signal.spec}: {cost}")


def _read_questions(rows: Sequence[Row], config: LabelConfig | EvalConfig, console: Console) -> dict[int, Question]:
    """Rows by number; those without answers are dropped and counted, and the first is named."""
    questions, dropped = {}, []
    for number, row in enumerate(rows):
        try:
            answers = [text_of(answer) for answer in responses_of(row, config.responses_column, number)]
        except UserError as error:
            dropped.append(str(error))
        except (AttributeError, TypeError):
            dropped.append(f"row {number}: an answer is neither a string nor messages")
        else:
            questions[number] = Question(row, row.get(config.prompt_column) or "", answers)
    report_dropped(console, dropped)
    if not questions:
        raise UserError(f"no row has answers: {dropped[0] if dropped else 'there are no rows'}")
    return questions


def _labels(row: Row, verdicts: dict[str, list[Verdict]], signals: list[Signal]) -> Row:
    """The new columns of a row; errors of an earlier labelling are not kept."""
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
    """The weighted sum; None if a signal whose weight is not 0 has no score."""
    total = 0.0
    for signal, verdict in zip(signals, verdicts, strict=True):
        if signal.weight == 0:
            continue
        if verdict.score is None:
            return None
        total += signal.weight * verdict.score
    # JSON has no infinity, which numbers near the end of a float's range may add up to.
    return max(-sys.float_info.max, min(sys.float_info.max, total))


def _summary(spec: str, verdicts: Verdicts) -> str:
    """`json: mean 0.53, 320 answers scored, 2 failed (row 3, answer 1: took longer than 10 s)`."""
    found = [(n, i, verdict) for n, by_spec in verdicts.items() for i, verdict in enumerate(by_spec[spec])]
    scores = [verdict.score for _, _, verdict in found if verdict.score is not None]
    mean = f"mean {sum(score / len(scores) for score in scores):.4g}, " if scores else ""
    text = f"{spec}: {mean}{len(scores)} answers scored"
    failed = [(n, i, verdict.reason) for n, i, verdict in found if verdict.score is None]
    if failed:
        number, index, reason = failed[0]
        text += f", {len(failed)} failed (row {number}, answer {index}: {reason})"
    return text


def _depends_on(rows: list[Row], signals: list[Signal], config: LabelConfig) -> dict[str, Any]:
    """All that a score depends on, by name."""
    settings = {field.name: getattr(config, field.name) for field in fields(SignalConfig)}
    for name in _WITHOUT_EFFECT:
        del settings[name]
    columns = [config.prompt_column, config.responses_column]
    depends_on = {"settings": [settings, columns], "rows": rows, "versions": versions("regex", "jsonschema")}
    if any(isinstance(signal.of_rows, ModelSignal) for signal in signals):
        from dpo_fast.model.placement import pick_device

        depends_on["device"] = pick_device(config.device).type
        depends_on["versions"] |= versions("torch", "transformers")
    identities = {f"files of the signal {signal.spec}": signal.identity for signal in signals}
    return depends_on | {name: identity for name, identity in identities.items() if identity is not None}
