"""`field:COLUMN`: scores that a row already holds, such as votes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.declare import bad_spec, row_signal
from dpo_fast.curate.verdict import Question, Unjudged, Verdict, verdict_of


@row_signal("field:COLUMN")
class FieldSignal:
    """`field:COLUMN`: the row's own list of scores, one per answer."""

    def __init__(self, column: str, config: SignalConfig) -> None:
        if not column:
            raise bad_spec("field", "field:COLUMN")
        self.column = column

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

    def _read(self, answer: str, row: dict[str, Any]) -> float:
        value = row["value"]
        if not isinstance(value, int | float):
            raise Unjudged(f"{self.column!r}: expected a number, found {type(value).__name__}")
        return value
