"""Signals that look at an answer's text and run none of it."""

from __future__ import annotations

import math
import re
import warnings
from collections import deque
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import regex

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.declare import bad_spec, text_signal
from dpo_fast.curate.verdict import TextSignal, Unjudged, Worst
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

# A sign counts unless a word stands before it ("10-3" ends in 3), a number unless it is the tail of a word ("H2O").
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+\u2212])?(?<!\w)(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?",
    re.ASCII,
)
_LENGTH = re.compile(r"(\d*)-(\d*)", re.ASCII)


@text_signal("compiles:python")
def compiles(argument: str, config: SignalConfig) -> TextSignal:
    """`compiles:python`: 1 if Python's compiler accepts the answer, else 0."""
    if argument != "python":
        raise bad_spec(f"compiles:{argument}", "compiles:python; no other language is known")
    return _compiles_python


def _compiles_python(answer: str, row: Row) -> float:
    if not answer.strip():
        return 0.0
    try:
        with warnings.catch_warnings():
            # The compiler warns about some answers (`"\d"`, `1 is 1`); -W error would turn that into a failure.
            warnings.simplefilter("ignore")
            compile(answer, "<answer>", "exec", dont_inherit=True)
    # ValueError: null bytes or lone surrogates. The others: nested too deeply, or too large, for the compiler.
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return 0.0
    return 1.0


@text_signal("regex:PATTERN")
def regex_match(argument: str, config: SignalConfig) -> TextSignal:
    """`regex:PATTERN`: 1 if the pattern is found in the answer, else 0."""
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


@text_signal("number:COLUMN", "number:COLUMN:squared")
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
    """The last number in a text (`1,234.5`, `-3`, `.5`, `2e-3`), or None."""
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


@text_signal("exact:COLUMN")
def exact(argument: str, config: SignalConfig) -> TextSignal:
    """`exact:COLUMN`: 1 if the answer is the column's text, or one of a list of texts, else 0."""
    if not argument:
        raise bad_spec("exact", "exact:COLUMN")
    return lambda answer, row: float(answer.strip() in _expected_texts(argument, row))


@text_signal("contains:COLUMN")
def contains(argument: str, config: SignalConfig) -> TextSignal:
    """`contains:COLUMN`: 1 if the column's text, or one of a list of texts, is in the answer, else 0."""
    if not argument:
        raise bad_spec("contains", "contains:COLUMN")
    return lambda answer, row: float(any(text in answer for text in _expected_texts(argument, row) if text))


@text_signal("length:MIN-MAX")
def length(argument: str, config: SignalConfig) -> TextSignal:
    """`length:MIN-MAX`: 1 if the number of characters is within these bounds, else 0; either may be left out."""
    found = _LENGTH.fullmatch(argument)
    if not found or argument == "-":
        raise bad_spec(f"length:{argument}", "length:MIN-MAX, length:MIN- or length:-MAX, in characters")
    low, high = int(found[1] or 0), int(found[2]) if found[2] else math.inf
    if low > high:
        raise bad_spec(f"length:{argument}", "the smaller number first")
    return lambda answer, row: float(low <= len(answer) <= high)
