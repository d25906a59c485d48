"""Signals that look at an answer's text alone: they run nothing of it.

Each builder takes what follows the signal's name and returns a `TextSignal`. This module is imported by the processes
that judge, so it must not import torch.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import regex

from dpo_fast.config import SignalConfig
from dpo_fast.curate.verdict import TextSignal, Unjudged, Worst
from dpo_fast.errors import UserError
from dpo_fast.user_code import load_function

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

Builder: TypeAlias = Callable[[str, SignalConfig], TextSignal]

# A sign counts where no word stands before it ("10-3" ends in 3), a number where it is not the tail of a word ("H2O").
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+\u2212])?(?<!\w)(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?",
    re.ASCII,
)
_LENGTH = re.compile(r"(\d*)-(\d*)", re.ASCII)


def bad_spec(spec: str, expected: str) -> UserError:
    """The error for a signal that is written wrongly."""
    return UserError(f"--signals {spec}: expected {expected}")


def compiles(argument: str, config: SignalConfig) -> TextSignal:
    """`compiles:python`: 1 where Python's compiler takes the answer, 0 where not."""
    if argument != "python":
        raise bad_spec(f"compiles:{argument}", "compiles:python; no other language is known")
    return _compiles_python


def _compiles_python(answer: str, row: Row) -> float:
    if not answer.strip():
        return 0.0
    try:
        with warnings.catch_warnings():
            # Python's remarks on the answer (`"\d"`, `1 is 1`) are no business of ours, and -W error makes them errors.
            warnings.simplefilter("ignore")
            compile(answer, "<answer>", "exec", dont_inherit=True)
    # ValueError: null bytes or lone surrogates. The others: nested too deeply, or too large, for the compiler.
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return 0.0
    return 1.0


class _NotJson(ValueError):
    """Something that Python's parser takes and RFC 8259 does not."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
# `int` refuses more than 4300 digits, since it needs quadratic time for them; to JSON such a number is a number.
_DECODER_OF_LONG_NUMBERS = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float)
_INVALID = object()


@lru_cache(maxsize=1)
def _parse(answer: str) -> Any:
    """The value of a JSON text, `_INVALID` where it is none; the last one is kept for the signals that follow."""
    try:
        if not answer.isascii():
            answer.encode()  # a lone surrogate is no text
        try:
            return _DECODER.decode(answer)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError | _NotJson):
                return _INVALID
            return _DECODER_OF_LONG_NUMBERS.decode(answer)
    except (ValueError, RecursionError):
        return _INVALID


def json_text(argument: str, config: SignalConfig) -> TextSignal:
    """`json`, `json:object` or `json:array`: 1 where the whole answer is that."""
    kinds: dict[str, type] = {"": object, "object": dict, "array": list}
    if argument not in kinds:
        raise bad_spec(f"json:{argument}", "json, json:object or json:array (for a schema: json_schema:FILE)")
    return partial(_is_json, kinds[argument])


def _is_json(kind: type, answer: str, row: Row) -> float:
    value = _parse(answer)
    return float(value is not _INVALID and isinstance(value, kind))


def json_schema(argument: str, config: SignalConfig) -> TextSignal:
    """`json_schema:FILE`: 1 where the whole answer is JSON that a JSON Schema allows."""
    spec = f"json_schema:{argument}"
    if not argument:
        raise bad_spec("json_schema", "json_schema:FILE")
    from jsonschema import SchemaError, validators
    from jsonschema_specifications import REGISTRY

    try:
        schema = json.loads(Path(argument).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--signals {spec}: cannot read the schema: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--signals {spec}: the schema is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise UserError(f"--signals {spec}: a schema is an object or a boolean, found {type(schema).__name__}")
    validator = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise UserError(f"--signals {spec}: not a valid schema: at {error.json_path}: {error.message}") from error
    # With this registry a reference to another address is an error; without, it would be fetched from the network.
    return partial(_matches_schema, validator(schema, registry=REGISTRY))


def _matches_schema(validator: Any, answer: str, row: Row) -> float:
    value = _parse(answer)
    if value is _INVALID:
        return 0.0
    try:
        return float(validator.is_valid(value))
    # Numbers beyond a float's range have no multiples, and nothing is valid that is nested too deeply to be looked at.
    except (OverflowError, RecursionError):
        return 0.0


def regex_match(argument: str, config: SignalConfig) -> TextSignal:
    """`regex:PATTERN`: 1 where the pattern is found in the answer."""
    if not argument:
        raise bad_spec("regex", "regex:PATTERN")
    try:
        pattern = regex.compile(argument)
    except regex.error as error:
        raise UserError(f"--signals regex:{argument}: not a regular expression: {error}") from error
    return partial(_search, pattern, config.timeout)


def _search(pattern: Any, timeout: float, answer: str, row: Row) -> float:
    try:
        return float(pattern.search(answer, timeout=timeout) is not None)
    except TimeoutError:
        raise Unjudged(f"took longer than {timeout:g} s") from None


def number(argument: str, config: SignalConfig) -> TextSignal:
    """`number:COLUMN` or `number:COLUMN:squared`: minus the error of the last number in the answer."""
    column, colon, kind = argument.partition(":")
    if not column or (colon and kind != "squared"):
        raise bad_spec(f"number:{argument}", "number:COLUMN or number:COLUMN:squared")
    return partial(_number_error, column, 2 if colon else 1)


def _number_error(column: str, power: int, answer: str, row: Row) -> float:
    expected = _expected_number(column, row)
    found = last_number(answer)
    if found is None:
        raise Worst("no number in the answer")
    error = abs(found - expected)
    try:
        error = error**power
    except OverflowError:
        error = math.inf
    if math.isinf(error):
        raise Worst("the number is too far off to be compared")
    return 0.0 - error


@lru_cache(maxsize=1)
def last_number(text: str) -> float | None:
    """The last number in a text: `1,234.5`, `-3`, `.5`, `2e-3`; None where there is none."""
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return float(last[0][0].replace(",", "").replace("\u2212", "-")) if last else None


def _expected_number(column: str, row: Row) -> float:
    value = _expected(column, row)
    number = last_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < math.inf:
        raise Unjudged(f"the row has no number in {column!r}")
    try:
        return float(number)
    except OverflowError:
        raise Unjudged(f"the row's number in {column!r} is too large") from None


def _expected(column: str, row: Row) -> Any:
    value = row.get(column)
    if value is None:
        raise Unjudged(f"the row has no {column!r}")
    return value


def _expected_texts(column: str, row: Row) -> list[str]:
    value = _expected(column, row)
    texts = [str(text).strip() for text in (value if isinstance(value, list) else [value])]
    if not any(texts):
        raise Unjudged(f"the row has an empty {column!r}")
    return texts


def exact(argument: str, config: SignalConfig) -> TextSignal:
    """`exact:COLUMN`: 1 where the answer is the column's text, or one of a list of texts."""
    if not argument:
        raise bad_spec("exact", "exact:COLUMN")
    return lambda answer, row: float(answer.strip() in _expected_texts(argument, row))


def contains(argument: str, config: SignalConfig) -> TextSignal:
    """`contains:COLUMN`: 1 where the column's text, or one of a list of texts, is in the answer."""
    if not argument:
        raise bad_spec("contains", "contains:COLUMN")
    return lambda answer, row: float(any(text in answer for text in _expected_texts(argument, row) if text))


def length(argument: str, config: SignalConfig) -> TextSignal:
    """`length:MIN-MAX`: 1 where the answer has so many characters; either end may be left open."""
    found = _LENGTH.fullmatch(argument)
    if not found or argument == "-":
        raise bad_spec(f"length:{argument}", "length:MIN-MAX, length:MIN- or length:-MAX, in characters")
    low, high = int(found[1] or 0), int(found[2]) if found[2] else math.inf
    if low > high:
        raise bad_spec(f"length:{argument}", "the smaller number first")
    return lambda answer, row: float(low <= len(answer) <= high)


def own_function(argument: str, config: SignalConfig) -> TextSignal:
    """`python:module:function`: the number or boolean that `function(answer, row)` returns."""
    if not argument.partition(":")[2]:
        raise bad_spec(f"python:{argument}", "python:module:function")
    return partial(_call_own, load_function(argument, f"--signals python:{argument}"))


def _call_own(function: Callable[[str, Row], Any], answer: str, row: Row) -> float:
    score = function(answer, row)
    try:
        return float(score)
    except (TypeError, ValueError):
        raise Unjudged(f"the function returned {type(score).__name__}; expected a number or a boolean") from None


TEXT_SIGNALS: dict[str, Builder] = {
    "compiles": compiles,
    "json": json_text,
    "json_schema": json_schema,
    "regex": regex_match,
    "number": number,
    "exact": exact,
    "contains": contains,
    "length": length,
    "python": own_function,
}
