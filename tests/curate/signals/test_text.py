"""Signals of text: good, bad, huge, empty and hostile answers."""

import pytest
from judging import HUGE, judge, judge_here, scores

from dpo_fast.curate.signals.text import last_number

PYTHON = {
    "x = 1\n": 1,
    "def f(a, /, *, b): return a + b\n": 1,
    "print('never printed')\nraise SystemExit(3)": 1,
    'pattern = "\\d"\nassert (1, "always true")\n1 is 1': 1,
    "x = ": 0,
    "return 1": 0,
    "```python\nx = 1\n```": 0,
    "Here is the code you asked for:": 0,
    "  x = 1": 0,
    "": 0,
    " \n": 0,
    "x = '\0'": 0,
    "x = '\ud800'": 0,
    "<b>x</b>": 0,
    "(" * 100_000 + ")" * 100_000: 0,
    "-" * 100_000 + "1": 0,
    "x = " + "9" * 10**6: 0,
    "x" * HUGE: 1,
    "x = 1\n" * 100_000: 1,
    "a" + ".b" * 100_000: 0,
}


def test_compiles_python(monkeypatch):
    # Warnings of the compiler about an answer would be errors.
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert scores("compiles:python", PYTHON) == list(PYTHON.values())


def test_regex():
    answers = ["Answer: 42", "answer: 42", "", "x" * HUGE + "Answer: 1", "Answer: \0", "<b>Answer: 7</b>", "\ud800"]
    assert scores(r"regex:Answer: \d", answers) == [1, 0, 0, 1, 0, 1, 0]
    assert scores(r"regex:(?i)^answer: \d+$", answers) == [1, 1, 0, 0, 0, 0, 0]
    assert scores("regex:a:b", ["a:b", "a"]) == [1, 0]


def test_a_regex_that_explodes_takes_no_more_than_its_time():
    [[slow, fast]] = judge([r"regex:(\w*)(\w*)\2\1[xz]$"], ["a" * 3000, "abbax"], timeout=0.5)
    assert slow == (None, "took longer than 0.5 s")
    assert fast == (1.0, None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("The answer is 1,234.5.", 1234.5),
        ("first 3, then -4", -4),
        ("10-3", 3),
        ("x = \u22125", -5),
        ("(2)-7", 7),
        ("$1,000,000 or 5%", 5),
        ("1,23", 23),
        ("2.5e-3 m", 0.0025),
        (".5", 0.5),
        ("3.", 3),
        ("\\boxed{17}", 17),
        ("5km of H2O", 5),
        ("-0", 0),
        ("\u0663 is three", None),
        ("no number", None),
        ("", None),
        ("NaN", None),
        ("inf", None),
        ("<p>12</p>", 12),
        ("8\0", 8),
        ("9" * 400, float("inf")),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_number_is_minus_the_error_and_no_number_is_worst():
    answers = ["It is 7.", "12", "none", "", "10", "9" * 10**6, "1e200", "1 " * (HUGE // 2)]
    [plain, squared] = judge(["number:gold", "number:gold:squared"], answers, {"gold": 10})
    assert [v.score for v in plain] == [-3, -2, -1e200 - 1, -1e200 - 1, 0, -1e200 - 1, -1e200, -9]
    assert [v.score for v in squared] == [-9, -4, -82, -82, 0, -82, -82, -81]
    assert [v.reason for v in squared[2:]] == [
        *["no number in the answer"] * 2,
        None,
        *["the number is too far off to be compared"] * 2,
        None,
    ]
    assert all(score <= 0 and str(score) != "-0.0" for score, _ in plain)


def test_without_any_number_all_are_alike():
    assert scores("number:gold", ["a", "b"], {"gold": 3}) == [-1, -1]


@pytest.mark.parametrize(
    ("gold", "score"),
    [
        *[("#### 1,000", -990.0), (10, 0.0), (10.5, -0.5), ("10", 0.0), (True, None), (None, None), ("ten", None)],
        *[([1], None), (float("nan"), None), (float("inf"), None), (10**400, None)],
    ],
)
def test_what_the_column_of_a_number_may_hold(gold, score):
    assert judge_here("number:gold", "10", {"gold": gold}).score == score


def test_exact_and_contains():
    answers = ["Paris", " Paris\n", "paris", "It is Paris.", "", "Pa\0ris", "x" * HUGE + "Paris"]
    assert scores("exact:gold", answers, {"gold": "Paris "}) == [1, 1, 0, 0, 0, 0, 0]
    assert scores("contains:gold", answers, {"gold": "Paris"}) == [1, 1, 0, 1, 0, 0, 1]
    assert scores("exact:gold", ["7", "8", "9"], {"gold": [7, "8"]}) == [1, 1, 0]
    assert scores("contains:gold", ["a 7", "8.", "9"], {"gold": [7, "8", ""]}) == [1, 1, 0]
    assert scores("exact:gold", ["\ud800", "<b>"], {"gold": "\ud800"}) == [1, 0]


@pytest.mark.parametrize("spec", ["exact:gold", "contains:gold", "number:gold"])
@pytest.mark.parametrize("row", [{}, {"gold": None}, {"gold": ""}, {"gold": []}])
def test_a_row_without_the_column_is_not_judged(spec, row):
    verdict = judge_here(spec, "7", row)
    assert verdict.score is None
    assert "'gold'" in verdict.reason


def test_length_counts_characters():
    assert scores("length:2-3", ["", "a", "ab", "\U0001f600é\0", "abcd", "x" * HUGE]) == [0, 0, 1, 1, 0, 0]
    assert scores("length:100000-", ["", "x" * 100_000]) == [0, 1]
    assert scores("length:-1", ["", "\ud800", "ab"]) == [1, 1, 0]
