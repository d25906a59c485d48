"""A function of the user's, whatever it does."""

from judging import HUGE, judge

from dpo_fast.curate.verdict import shorten


def test_a_function_of_the_users(own):
    answers = {
        "": (0.0, None),
        "long": (1.0, None),
        "x" * HUGE: (1.0, None),
        "raise": (None, "ValueError: no such thing"),
        "exit": (None, "SystemExit: 3"),
        "none": (None, "the function returned NoneType; expected a number or a boolean"),
        "nan": (None, "the score is nan; expected a finite number"),
        "crash": (None, "ended the process that judged it (signal 11, Segmentation fault)"),
        "gone": (None, "ended the process that judged it (exit code 4)"),
        "sleep": (None, "took longer than 0.3 s"),
        "hold": (None, "took longer than 0.3 s"),
        "after": (1.0, None),
    }
    [verdicts] = judge([own], answers, {"limit": 2}, timeout=0.3)
    assert verdicts == list(answers.values())
    [[recursion, shout]] = judge([own], ["recurse", "shout"])
    assert recursion.reason.startswith("RecursionError")
    assert shout.reason == shorten("ValueError: " + "x? " * 100)
