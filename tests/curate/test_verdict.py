"""What a signal raises or returns, as a verdict."""

from dpo_fast.curate.verdict import Unjudged, Verdict, Worst, rank_worst_last, verdict_of


def test_verdicts_of_a_row_are_settled_together():
    lowest = Verdict(float("-inf"), "worst")
    assert rank_worst_last([Verdict(2.0), lowest, Verdict(None, "why"), Verdict(-3.0), lowest]) == [
        (2.0, None),
        (-4.0, "worst"),
        (None, "why"),
        (-3.0, None),
        (-4.0, "worst"),
    ]


def test_what_a_signal_may_raise():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def raising(error):
        def signal(answer, row):
            raise error

        return verdict_of(signal, "", {})

    assert raising(Unjudged("why")) == (None, "why")
    assert raising(Worst("bad")) == (float("-inf"), "bad")
    assert raising(Mute()) == (None, "Mute")
    assert raising(MemoryError()) == (None, "MemoryError")
