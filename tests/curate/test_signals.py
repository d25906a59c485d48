"""Signals of text: good, bad, huge, empty and hostile answers, judged in the processes that judge them in earnest."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap

import psutil
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals import text as text_signals
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question, Unjudged, Verdict, Worst, rank_worst_last, shorten, verdict_of
from dpo_fast.curate.workers import pool as workers
from dpo_fast.curate.workers.pool import judge_texts
from dpo_fast.curate.workers.worker import Heartbeat
from dpo_fast.errors import UserError

HUGE = 10_000_000


def judge(specs, answers, row=None, **settings):
    """For each signal, the verdict on each answer."""
    config = SignalConfig(signals=specs, **{"num_workers": 1} | settings)
    [(_, verdicts)] = judge_texts({0: Question(row or {}, "", list(answers))}, parse_signals(config), config)
    return verdicts


def scores(spec, answers, row=None, **settings):
    [verdicts] = judge([spec], answers, row, **settings)
    return [verdict.score for verdict in verdicts]


def judge_here(spec, answer, row=None):
    """In this process, for answers that are harmless."""
    [signal] = parse_signals(SignalConfig(signals=spec))
    return verdict_of(signal.of_text, answer, row or {})


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


JSON = {
    "{}": 1,
    ' \t\r\n{"a": [1, -0.5e+3, true, null, "\\ud83d\\ude00 é"]}\n': 1,
    "[1, 2]": 1,
    "3": 1,
    '"x"': 1,
    "9" * 10**6: 1,
    "[" * 500 + "]" * 500: 1,
    "[" + "1," * (HUGE // 2) + "1]": 1,
    "": 0,
    " ": 0,
    "Sure: {}": 0,
    "```json\n{}\n```": 0,
    "{} {}": 0,
    "{'a': 1}": 0,
    '{"a": 1,}': 0,
    "NaN": 0,
    '{"a": -Infinity}': 0,
    "[01]": 0,
    "[+1]": 0,
    "[1.]": 0,
    "[\u0663]": 0,
    '"a\nb"': 0,
    '"\0"': 0,
    '"\ud800"': 0,
    "\u00a0{}": 0,
    "\ufeff{}": 0,
    "[" * 100_000 + "]" * 100_000: 0,
    '{"a":' * 100_000: 0,
    "<script>": 0,
}


def test_json_is_rfc_8259():
    assert scores("json", JSON) == list(JSON.values())


def test_json_of_a_kind():
    answers = ["{}", "[]", "1", '"{}"', "", '{"a": [NaN]}', "null"]
    assert scores("json:object", answers) == [1, 0, 0, 0, 0, 0, 0]
    assert scores("json:array", answers) == [0, 1, 0, 0, 0, 0, 0]


# The grammar of RFC 8259, sections 2 to 7.
GRAMMAR = regex.compile(
    r"""(?(DEFINE)
    (?<ws> [\x20\t\n\r]* )
    (?<string> " (?: [^"\\\x00-\x1f\ud800-\udfff] | \\ (?: ["\\/bfnrt] | u [0-9A-Fa-f]{4} ) )* " )
    (?<number> -? (?: 0 | [1-9][0-9]* ) (?: \. [0-9]+ )? (?: [eE] [-+]? [0-9]+ )? )
    (?<array> \[ (?: (?&value) (?: , (?&value) )* | (?&ws) ) \] )
    (?<member> (?&ws) (?&string) (?&ws) : (?&value) )
    (?<object> \{ (?: (?&member) (?: , (?&member) )* | (?&ws) ) \} )
    (?<value> (?&ws) (?: true | false | null | (?&string) | (?&number) | (?&array) | (?&object) ) (?&ws) )
    ) (?&value)""",
    regex.VERBOSE,
)
PIECES = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "\\u00e9",
    "true",
    "null",
    "-",
    "0",
    "12",
    ".5",
    "e+3",
    "a",
    "\n",
    "\0",
]
PIECES += ['"a"', '"a":', " ", "\ud800", "é", "NaN", "+", "\u0663"]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
@settings(max_examples=2000, deadline=None)
def test_json_agrees_with_the_grammar(text):
    assert judge_here("json", text).score == (GRAMMAR.fullmatch(text) is not None)


@pytest.fixture
def schema(tmp_path):
    def write(value):
        path = tmp_path / "schema.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return f"json_schema:{path}"

    return write


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_schema(schema):
    answers = {
        '{"name": "Ada", "age": 36}': 1,
        '{"name": "Ada"}': 1,
        '{"name": "ada"}': 0,
        '{"name": "Ada", "age": -1}': 0,
        '{"name": "Ada", "age": 1.5}': 0,
        '{"name": "Ada", "age": NaN}': 0,
        '{"name": "Ada", "more": 1}': 0,
        '{"age": 1}': 0,
        "[]": 0,
        "": 0,
        "Ada": 0,
        '{"name": "A' + "a" * HUGE + '"}': 1,
        '{"name": "Ada", "age": ' + "9" * 10**6 + "}": 0,
        "[" * 100_000 + "]" * 100_000: 0,
        '{"name": "\ud800"}': 0,
    }
    assert scores(schema(PERSON), answers) == list(answers.values())


def test_a_number_beyond_floats_is_no_multiple_of_anything(schema):
    assert scores(schema({"multipleOf": 0.5}), ["2.5", "2.6", "1e999"]) == [1, 0, 0]


def test_a_schema_may_refer_to_itself_but_not_to_the_network(schema):
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert scores(schema(tree), ["[[], [[]]]", "[[], 1]", "[" * 50 + "]" * 50]) == [1, 0, 1]
    [[verdict]] = judge([schema({"$ref": "http://127.0.0.1:9/person.json"})], ["{}"])
    assert verdict.score is None
    assert "Unresolvable" in verdict.reason


def test_a_schema_whose_pattern_explodes_takes_no_more_than_its_time(schema):
    spec = schema({"pattern": "^(a+)+$"})
    [[slow, fast]] = judge([spec], [f'"{"a" * 40}!"', '"aaa"'], timeout=0.5)
    assert slow == (None, "took longer than 0.5 s")
    assert fast == (1.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the schema is not JSON"),
        ("3", "found int"),
        ('{"type": "text"}', "not a valid schema: at \\$.type"),
        ('{"pattern": "("}', "not a valid schema"),
    ],
)
def test_a_schema_is_checked_at_the_start(schema, text, message):
    with pytest.raises(UserError, match=message):
        parse_signals(SignalConfig(signals=schema(text)))


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
    assert text_signals.last_number(text) == number


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


def test_field_reads_the_rows_own_scores():
    [signal] = parse_signals(SignalConfig(signals="field:votes"))
    rows = [{"votes": [1, 2.5]}, {"votes": [None, "3"]}, {"votes": [1]}, {}, {"votes": [float("nan"), True]}]
    [good, odd, short, absent, nan] = signal.of_rows.judge([Question(row, "", ["a", "b"]) for row in rows])
    assert good == [(1.0, None), (2.5, None)]
    assert [v.reason for v in odd] == [f"'votes': expected a number, found {t}" for t in ("NoneType", "str")]
    assert [v.reason for v in short] == ["'votes': expected a list of 2 numbers, found 1 values"] * 2
    assert [v.reason for v in absent] == ["'votes': expected a list of 2 numbers, found NoneType"] * 2
    assert nan == [(None, "the score is nan; expected a finite number"), (1.0, None)]


OWN = """
import os, signal, sys, time

def judge(answer, row):
    match answer:
        case "raise": raise ValueError("no such thing")
        case "exit": sys.exit(3)
        case "none": return None
        case "nan": return float("nan")
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "gone": os._exit(4)
        case "sleep": time.sleep(600)
        case "hold": sum(iter(lambda: 1, 2))
        case "deaf":
            while True:
                try: time.sleep(600)
                except BaseException: pass
        case "stuck": max(range(10**13))
        case "recurse": return judge(answer, row) + judge(answer, row)
        case "shout": raise ValueError("x\\ud800\\n" * 10**6)
    return len(answer) > row.get("limit", 0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_signal_module.py").write_text(OWN)
    yield "python:own_signal_module:judge"
    sys.modules.pop("own_signal_module", None)


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


def test_what_does_not_come_back_is_killed(own, monkeypatch):
    monkeypatch.setattr(workers, "KILL_GRACE", 0.5)
    [verdicts] = judge([own], ["good", "stuck", "deaf", "good"], timeout=0.3)
    killed = (None, "took longer than 0.3 s and was killed")
    assert verdicts == [(1.0, None), killed, killed, (1.0, None)]


def test_a_crash_costs_no_other_row_its_scores(own):
    config = SignalConfig(signals=[own, "json"], num_workers=2)
    questions = {n: Question({}, "", ["a", "crash" if n % 10 == 3 else "[]"]) for n in range(40)}
    found = dict(judge_texts(questions, parse_signals(config), config))
    assert sorted(found) == list(range(40))
    for number, [of_own, of_json] in found.items():
        crashed = number % 10 == 3
        assert [v.score for v in of_own] == [1, None if crashed else 1]
        assert [v.score for v in of_json] == [0, 0 if crashed else 1]


class _Poison:
    """A value that kills who reads it."""

    def __reduce__(self):
        return os._exit, (5,)


def test_a_row_that_cannot_even_be_read_is_marked_alone(monkeypatch):
    config = SignalConfig(signals=["json", "length:1-"], num_workers=1)
    questions = {n: Question({"x": _Poison() if n in (2, 5) else 0}, "", ["[]", ""]) for n in range(8)}
    found = dict(judge_texts(questions, parse_signals(config), config))
    reason = "ended the process that judged it (exit code 5)"
    for number, verdicts in found.items():
        poisoned = [[(None, reason)] * 2] * 2
        assert verdicts == (poisoned if number in (2, 5) else [[(1.0, None), (0.0, None)]] * 2)


def test_a_heartbeat_is_never_read_half_written(tmp_path):
    with (tmp_path / "shared").open("w+b") as shared:
        shared.truncate(Heartbeat.SIZE)
        writer = """
            import sys
            from dpo_fast.curate.workers.worker import Heartbeat, Place
            heartbeat, number = Heartbeat(int(sys.argv[1])), 0
            while True:
                number += 1
                heartbeat.set(Place(number, number, number))
        """
        command = [sys.executable, "-c", textwrap.dedent(writer), str(shared.fileno())]
        heartbeat = Heartbeat(shared.fileno())
        with subprocess.Popen(command, pass_fds=[shared.fileno()]) as process:
            while heartbeat.get()[0].row <= 0:
                assert process.poll() is None
            seen = {heartbeat.get() for _ in range(300_000)}
            process.kill()
        assert len(seen) > 100
        assert {place for place, _ in seen if len(set(place)) != 1} == set()
        # Seconds: the machine has run for longer than this process may rest.
        assert max(seconds for _, seconds in seen) < 60
        heartbeat.close()


def test_workers_that_cannot_start_end_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers, "_START", "raise SystemExit(9)")
    with pytest.raises(RuntimeError, match="exit code 9"):
        judge(["json"], ["[]"])
    assert list(tmp_path.iterdir()) == []


def test_memory_that_an_answer_takes_is_limited(schema):
    # Python needs some 600 bytes for each of these, a list that JSON spends two characters on needs 64.
    answers = ["f(x)\n" * 2_000_000, "x = 1"]
    assert scores("compiles:python", answers, memory_limit_mib=256) == [0, 1]


def test_a_script_without_a_main_guard_can_judge(tmp_path):
    script = """
        print("once")
        from rich.console import Console
        from dpo_fast.curate.label import label_rows
        from dpo_fast.config import LabelConfig
        rows = [{"responses": ["[]", "x"]}] * 3
        found = label_rows(rows, LabelConfig(signals="json", num_workers=2), console=Console(quiet=True))
        print([row["scores"] for row in found])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert done.stdout == f"once\n{[[1.0, 0.0]] * 3}\n"


def test_workers_do_not_import_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_modules.py").write_text("import sys\ndef judge(answer, row): return answer in sys.modules\n")
    assert scores("python:own_modules:judge", ["torch", "transformers", "regex"]) == [0, 0, 1]


def test_no_process_and_no_file_is_left(own, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    judge([own], ["good", "crash", "sleep"], timeout=0.3, num_workers=2)
    assert list(scratch.iterdir()) == []
    assert [p for p in psutil.Process().children() if "workers.worker" in " ".join(p.cmdline())] == []


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "no signals given.*compiles:python.*judge:NAME"),
        ("jsonn", "--signals jsonn: unknown; choose from compiles:python"),
        (["json", "json"], "named twice"),
        ("compiles:rust", "expected compiles:python"),
        ("json:string", "expected json, json:object or json:array"),
        ("json_schema", "expected json_schema:FILE"),
        ("json_schema:no-such-file.json", "cannot read the schema: No such file"),
        ("regex", "expected regex:PATTERN"),
        ("regex:(", "not a regular expression"),
        ("number", "expected number:COLUMN"),
        ("number:gold:cubed", "expected number:COLUMN or number:COLUMN:squared"),
        ("exact", "expected exact:COLUMN"),
        ("contains:", "expected contains:COLUMN"),
        ("length:5", "expected length:MIN-MAX"),
        ("length:9-3", "the smaller number first"),
        ("length:-", "expected length:MIN-MAX"),
        ("field", "expected field:COLUMN"),
        ("python:", "expected python:module:function"),
        ("python:no_such_module:f", "cannot be imported"),
        ("python:json:nothing", "cannot be imported"),
        ("python:math:pi", "expected a function, found float"),
        ("reward-model", "expected reward-model:NAME"),
        ("judge:", "expected judge:NAME"),
    ],
)
def test_a_signal_that_is_written_wrongly(spec, message):
    with pytest.raises(UserError, match=message):
        parse_signals(SignalConfig(signals=spec))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_weights_must_fit(weights):
    with pytest.raises(UserError, match="expected 2 numbers, one for each"):
        parse_signals(SignalConfig(signals=["json", "length:1-2"], signal_weights=weights))
