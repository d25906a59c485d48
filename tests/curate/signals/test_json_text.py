"""JSON and JSON Schema, against the grammar of RFC 8259."""

import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import HUGE, judge, judge_here, scores

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.errors import UserError

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
