"""Files and data sets -> rows, each with its place in the source."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError

# Of one row in a file of lines.
LINE_BYTES = 2**26
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row.

    Attributes:
        index: counted from 0.
        place: where a person finds it, such as `line 12`.
        value: what stands there, normally a dict; None where it cannot be read.
        error: why not, then.
        has_duplicate_keys: an object in it names a key twice; the last value was read.
    """

    index: int
    place: str
    value: Any
    error: str = ""
    has_duplicate_keys: bool = False


class _Repeating(dict[str, Any]):
    """A JSON object that names a key twice."""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    return value if len(value) == len(items) else _Repeating(value)


def _repeats(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value, _Repeating) or any(map(_repeats, value.values()))
    return isinstance(value, list) and any(map(_repeats, value))


def read_rows(source: str, max_rows: int | None = None) -> Iterator[SourceRow]:
    """Rows of a file or a Hub data set.

    Raises:
        UserError: no such file or data set, or a kind that is not read.
    """
    return islice(_rows(source), max_rows)


def _rows(source: str) -> Iterator[SourceRow]:
    path = Path(source)
    if source.endswith(SUFFIXES):
        if not path.is_file():
            raise UserError(f"--data {source}: no such file")
        return _file_rows(path)
    if path.exists():
        raise UserError(f"--data {source}: expected a file that ends in {', '.join(SUFFIXES)}, or a Hub dataset's name")
    return _hub_rows(source)


def _file_rows(path: Path) -> Iterator[SourceRow]:
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.name.endswith(".json"):
            yield from _json_rows(path)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
                yield from _json_lines(_lines(f, path))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _lines(file: Any, path: Path) -> Iterator[bytes]:
    """The lines of a binary file, as long as they are lines.

    Raises:
        UserError: one is longer than any row would be, which a compressed file may hide.
    """
    for number in count(1):
        line = file.readline(LINE_BYTES + 1)
        if len(line) > LINE_BYTES:
            raise UserError(
                f"--data {path}, line {number}: longer than {LINE_BYTES // 2**20} MiB; expected one row a line"
            )
        if not line:
            return
        yield line


def _json_lines(lines: Iterable[bytes]) -> Iterator[SourceRow]:
    index = 0
    for number, line in enumerate(lines, 1):
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not text:
            continue
        value, problem = None, ""
        try:
            value = json.loads(text.decode(), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text at byte {error.start + 1}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
            problem = str(error)
        yield SourceRow(index, f"line {number}", value, problem, _repeats(value))
        index += 1


def _json_rows(path: Path) -> Iterator[SourceRow]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(
                f"--data {path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); expected a "
                "list of rows"
            ) from error
        # One object a line under a .json name is common.
        yield from _json_lines(text.encode().split(b"\n"))
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"--data {path}: not valid JSON ({error}); expected a list of rows") from error
    if isinstance(rows, dict) and "chosen" in rows:
        rows = [rows]
    if not isinstance(rows, list):
        raise UserError(f"--data {path}: expected a list of rows, found {_kind(rows)}")
    for index, value in enumerate(rows):
        yield SourceRow(index, f"row {index}", value, has_duplicate_keys=_repeats(value))


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for value in _batch_rows(batch, path, index):
                yield SourceRow(index, f"row {index}", _without_nulls(value))
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"--data {path}: not a parquet file: {error}") from error


def _batch_rows(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """The rows of a record batch.

    Raises:
        UserError: Python has no such value, a date beyond the year 9999 say; it names row and column.
    """
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except (ArithmeticError, ValueError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column):
                try:
                    value.as_py()
                except (ArithmeticError, ValueError) as error:
                    raise UserError(
                        f"--data {path}, row {first + number}: column {name!r} holds a value that cannot be read "
                        f"({error}); remove or convert it"
                    ) from error
        raise


def _hub_rows(source: str) -> Iterator[SourceRow]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:
        # The Hub's client raises many kinds; for a user all of them mean that the name does not lead to data.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--data {source}: neither a file that ends in {', '.join(SUFFIXES)} nor a dataset that could be loaded: "
            f"{first_line}"
        ) from error
    for index, value in enumerate(dataset):
        yield SourceRow(index, f"row {index}", _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null: columnar files fill in the keys that other rows have, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r:.40}")
