"""Signals that read an answer as JSON (RFC 8259)."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dpo_fast.config import SignalConfig
from dpo_fast.curate.identity import file_identity
from dpo_fast.curate.signals.declare import bad_spec, text_signal
from dpo_fast.curate.verdict import TextSignal
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row


class _NotJson(ValueError):
    """Something that Python's parser accepts and RFC 8259 does not."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
# `int` refuses more than 4300 digits, since it needs quadratic time for them; in JSON such a number is a number.
_DECODER_OF_LONG_NUMBERS = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float)
_INVALID = object()


@lru_cache(maxsize=1)
def _parse(answer: str) -> Any:
    """The value of a JSON text, or `_INVALID`; the last one is cached for the signals that follow."""
    try:
        if not answer.isascii():
            answer.encode()  # a lone surrogate is not text
        try:
            return _DECODER.decode(answer)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError | _NotJson):
                return _INVALID
            return _DECODER_OF_LONG_NUMBERS.decode(answer)
    except (ValueError, RecursionError):
        return _INVALID


@text_signal("json", "json:object", "json:array")
def json_text(argument: str, config: SignalConfig) -> TextSignal:
    """`json`, `json:object` or `json:array`: 1 if the whole answer is that, else 0."""
    kinds: dict[str, type] = {"": object, "object": dict, "array": list}
    if argument not in kinds:
        raise bad_spec(f"json:{argument}", "json, json:object or json:array (for a schema: json_schema:FILE)")
    return partial(_is_json, kinds[argument])


def _is_json(kind: type, answer: str, row: Row) -> float:
    value = _parse(answer)
    return float(value is not _INVALID and isinstance(value, kind))


@text_signal("json_schema:FILE", identity=file_identity)
def json_schema(argument: str, config: SignalConfig) -> TextSignal:
    """`json_schema:FILE`: 1 if the whole answer is JSON that a JSON Schema allows, else 0."""
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
    # With this registry a reference to another address is an error; without it, the network would be asked.
    return partial(_matches_schema, validator(schema, registry=REGISTRY))


def _matches_schema(validator: Any, answer: str, row: Row) -> float:
    value = _parse(answer)
    if value is _INVALID:
        return 0.0
    try:
        return float(validator.is_valid(value))
    # Numbers beyond a float's range are multiples of nothing, and what is nested too deeply to validate is not valid.
    except (OverflowError, RecursionError):
        return 0.0
