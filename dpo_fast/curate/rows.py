"""What all steps of curation share: rows in, rows out, and the text of a prompt or an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from dpo_fast.console import say
from dpo_fast.data.rows import read_rows
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Rows: TypeAlias = "str | Path | Sequence[Row] | Dataset"


def read_objects(source: str, max_rows: int | None, console: Console) -> list[Row]:
    """Rows of a file or Hub data set; those that are no objects are left out, counted, and the first one is named.

    Raises:
        UserError: the source cannot be read, or holds no usable row.
    """
    if not source:
        raise UserError("no data given: pass --data with a file of rows or a Hub dataset's name")
    rows: list[Row] = []
    broken: list[str] = []
    for row in read_rows(source, max_rows):
        if isinstance(row.value, dict):
            rows.append(row.value)
        else:
            broken.append(f"{row.place}: {row.error or 'expected an object with fields'}")
    tell_left_out(console, broken, f"{source}: ")
    if not rows:
        raise UserError(f"--data {source}: holds no usable row; expected one JSON object a line")
    return rows


def tell_left_out(console: Console, reasons: Sequence[str], source: str = "") -> None:
    """Say how many rows are left out, and why the first one is; nothing where there are none."""
    if reasons:
        say(console, f"{source}{len(reasons)} rows left out ({reasons[0]})")


def as_rows(data: Rows, console: Console) -> list[Row]:
    """Rows of whatever the Python functions take: a file's name, a Hub name, a list of dicts or a `Dataset`."""
    if isinstance(data, str | Path):
        return read_objects(str(data), None, console)
    return [dict(row) for row in data]


def as_dataset(rows: Iterable[Row]) -> Dataset:
    """Rows as a `datasets.Dataset`; a key that some rows lack is null there.

    Raises:
        UserError: a column holds values of several types, such as strings and messages.
    """
    import pyarrow
    from datasets import Dataset

    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except pyarrow.ArrowException as error:
        raise UserError(
            f"these rows cannot be one Dataset, whose columns have one type each ({error}): make the column's values "
            "alike, or use the commands on files, which do not mind"
        ) from error


def check_out(out: str, *, option: str = "--out", overwrite: bool) -> Path:
    """The file to write.

    Raises:
        UserError: none was given, it has another ending, or it is there already.
    """
    if not out:
        raise UserError(f"no output given: pass {option} with the .jsonl file to write")
    path = Path(out)
    if path.suffix != ".jsonl":
        raise UserError(f"{option} {out}: expected a file that ends in .jsonl")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {out} is there already: choose another file, or replace it by --overwrite true")
    return path


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, "".join(_line(row) for row in rows))


def _line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no file can hold it, but JSON's escapes can
        return json.dumps(row) + "\n"
    return line


def text_of(value: Any) -> str:
    """The text of a prompt or an answer: a string as it is, of messages the contents, one below the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    return "\n\n".join(str(message.get("content") or "") for message in value)


def responses_of(row: Row, column: str, number: int) -> list[Any]:
    """A row's answers.

    Args:
        row: with a list of strings or messages.
        column: its name.
        number: of the row, counted from 0, for messages.

    Raises:
        UserError: there is none, or it is no list of answers.
    """
    responses = row.get(column)
    if not isinstance(responses, list) or not all(isinstance(value, str | list | dict) for value in responses):
        raise UserError(
            f"row {number}: field {column!r}: expected a list of answers (strings or messages), found "
            f"{type(responses).__name__}; the row has {', '.join(map(repr, row)) or 'no fields'}"
        )
    return responses
