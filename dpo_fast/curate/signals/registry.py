"""Signals by name: what `--signals` says, as functions that judge.

A text signal sees one answer and its row; processes of their own call it (`workers/pool.py`), since answers may be
hostile. A row signal sees many rows at once and runs in this process: it reads a column, or asks a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.command import command
from dpo_fast.curate.signals.text import TEXT_SIGNALS, bad_spec
from dpo_fast.curate.verdict import Question, TextSignal, Unjudged, Verdict, Worst, rank_worst_last, verdict_of
from dpo_fast.errors import UserError

__all__ = [
    "Question",
    "RowSignal",
    "Signal",
    "TextSignal",
    "Unjudged",
    "Verdict",
    "Worst",
    "parse_signals",
    "rank_worst_last",
    "verdict_of",
]

KNOWN = (
    "compiles:python, json, json:object, json:array, json_schema:FILE, regex:PATTERN, number:COLUMN, "
    "number:COLUMN:squared, exact:COLUMN, contains:COLUMN, length:MIN-MAX, field:COLUMN, command:PROGRAM ARG..., "
    "python:module:function, reward-model:NAME, judge:NAME"
)


class RowSignal(Protocol):
    """Judges many rows at once."""

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """One list for each row, with one verdict for each of its answers."""


@dataclass(frozen=True)
class Signal:
    """A signal by its name.

    Attributes:
        spec: as the user wrote it.
        weight: factor in the sum.
        of_text: judges one answer; None for the other kind.
        of_rows: judges many rows; None for the other kind.
    """

    spec: str
    weight: float
    of_text: TextSignal | None = None
    of_rows: RowSignal | None = None


@dataclass(frozen=True)
class FieldSignal:
    """`field:COLUMN`: the row's own list of scores, one an answer."""

    column: str

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """The column's numbers."""
        return [self._judge(question) for question in questions]

    def _judge(self, question: Question) -> list[Verdict]:
        values = question.row.get(self.column)
        if not isinstance(values, list) or len(values) != len(question.answers):
            found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
            reason = f"{self.column!r}: expected a list of {len(question.answers)} numbers, found {found}"
            return [Verdict(None, reason)] * len(question.answers)
        return [verdict_of(self._read, "", {"value": value}) for value in values]

    def _read(self, answer: str, row: dict[str, object]) -> float:
        value = row["value"]
        if not isinstance(value, int | float):
            raise Unjudged(f"{self.column!r}: expected a number, found {type(value).__name__}")
        return value


def _field(argument: str, config: SignalConfig) -> RowSignal:
    if not argument:
        raise bad_spec("field", "field:COLUMN")
    return FieldSignal(argument)


def _reward_model(argument: str, config: SignalConfig) -> RowSignal:
    if not argument:
        raise bad_spec("reward-model", "reward-model:NAME, a checkpoint folder or Hub name")
    from dpo_fast.curate.signals.models import RewardModel

    return RewardModel(argument, config)


def _judge(argument: str, config: SignalConfig) -> RowSignal:
    if not argument:
        raise bad_spec("judge", "judge:NAME, a checkpoint folder or Hub name")
    from dpo_fast.curate.signals.judge import Judge

    return Judge(argument, config)


_OF_TEXT = {**TEXT_SIGNALS, "command": command}
_OF_ROWS: dict[str, Callable[[str, SignalConfig], RowSignal]] = {
    "field": _field,
    "reward-model": _reward_model,
    "judge": _judge,
}


def parse_signals(config: SignalConfig) -> list[Signal]:
    """The signals that a configuration names, with their weights. No model is loaded yet.

    Raises:
        UserError: none is named, one is unknown or cannot be had, or the weights do not fit.
    """
    specs = [config.signals] if isinstance(config.signals, str) else list(config.signals)
    specs = [spec for spec in specs if spec]
    if not specs:
        raise UserError(f"no signals given: pass --signals with one or a list of {KNOWN}")
    if repeated := sorted({spec for spec in specs if specs.count(spec) > 1}):
        raise UserError(f"--signals {repeated[0]}: named twice; to count it more, use --signal_weights")
    weights = [1.0] * len(specs) if config.signal_weights is None else config.signal_weights
    if len(weights) != len(specs) or not all(map(math.isfinite, weights)):
        raise UserError(f"--signal_weights {weights}: expected {len(specs)} numbers, one for each of {specs}")
    if config.timeout <= 0:
        raise UserError(f"--timeout {config.timeout:g}: expected seconds above 0")
    return [_build(spec, weight, config) for spec, weight in zip(specs, weights, strict=True)]


def _build(spec: str, weight: float, config: SignalConfig) -> Signal:
    name, _, argument = spec.partition(":")
    if name in _OF_TEXT:
        return Signal(spec, weight, of_text=_OF_TEXT[name](argument, config))
    if name in _OF_ROWS:
        return Signal(spec, weight, of_rows=_OF_ROWS[name](argument, config))
    raise UserError(f"--signals {spec}: unknown; choose from {KNOWN}")
