"""Scores that a row already holds."""

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question


def test_field_reads_the_rows_own_scores():
    [signal] = parse_signals(SignalConfig(signals="field:votes"))
    rows = [{"votes": [1, 2.5]}, {"votes": [None, "3"]}, {"votes": [1]}, {}, {"votes": [float("nan"), True]}]
    [good, odd, short, absent, nan] = signal.of_rows.judge([Question(row, "", ["a", "b"]) for row in rows])
    assert good == [(1.0, None), (2.5, None)]
    assert [v.reason for v in odd] == [f"'votes': expected a number, found {t}" for t in ("NoneType", "str")]
    assert [v.reason for v in short] == ["'votes': expected a list of 2 numbers, found 1 values"] * 2
    assert [v.reason for v in absent] == ["'votes': expected a list of 2 numbers, found NoneType"] * 2
    assert nan == [(None, "the score is nan; expected a finite number"), (1.0, None)]
