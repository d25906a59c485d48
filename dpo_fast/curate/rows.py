"""What all steps of curation share: rows in, rows out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from dpo_fast.console import say
from dpo_fast.data.rows import read_rows
from dpo_fast.errors import UserError
from dpo_fast.files import hold, write_file_atomically

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Rows: TypeAlias = "str | Path | Sequence[Row] | Dataset"


def read_objects(source: str, max_rows: int | None, console: Console) -> list[Row]:
    """Rows of a file or Hub dataset; those that are not objects are dropped and counted, and the first one is named.

    Raises:
        UserError: the source cannot be read, or has no usable rows.
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
    report_dropped(console, broken, f"{source}: ")
    if not rows:
        raise UserError(f"--data {source}: no usable rows; expected one JSON object per line")
    return rows


def report_dropped(console: Console, reasons: Sequence[str], source: str = "") -> None:
    """Say how many rows are dropped and why the first one is; nothing if there are none."""
    if reasons:
        say(console, f"{source}{len(reasons)} rows dropped ({reasons[0]})")


def as_rows(data: Rows, console: Console) -> list[Row]:
    """Rows of whatever the Python functions take: a file name, a Hub name, a list of dicts or a `Dataset`."""
    if isinstance(data, str | Path):
        return read_objects(str(data), None, console)
    return [dict(row) for row in data]


def as_dataset(rows: Iterable[Row]) -> Dataset:
    """Rows as a `datasets.Dataset`; a key that a row lacks is null.

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
            f"these rows cannot be one Dataset, whose columns have one type each ({error}): give a column's values one "
            "type, or use the commands on files, which accept mixed types"
        ) from error


def check_out(out: str, *, option: str = "--out", overwrite: bool) -> Path:
    """The path of the file to write.

    Raises:
        UserError: none was given, it has another extension, or it exists already.
    """
    if not out:
        raise UserError(f"no output given: pass {option} with the .jsonl file to write")
    path = Path(out)
    if path.suffix != ".jsonl":
        raise UserError(f"{option} {out}: expected a file that ends in .jsonl")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {out} exists already: choose another file, or replace it with --overwrite true")
    return path


@contextmanager
def hold_output(out: Path, *, option: str = "--out") -> Iterator[None]:
    """Make the folder of a file and let no other process write the file meanwhile.

    Raises:
        UserError: another process is writing it, which the message names, or the folder cannot be made.
        WriteError: the folder cannot be written to.
    """
    if out.is_dir():
        raise UserError(f"{option} {out}: a folder; expected the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {out}: cannot be written to: {error.strerror}") from error
    with hold(Path(f"{out}.lock"), str(out)):
        yield


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line; the file is complete or absent.

    Raises:
        WriteError: the file cannot be written; an older one stays.
    """
    write_file_atomically(path, to_lines(rows))


def to_lines(rows: Iterable[Row]) -> str:
    """One JSON object per line."""
    return "".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: UTF-8 cannot hold it, but JSON escapes can
        return json.dumps(row) + "\n"
    return line


def responses_of(row: Row, column: str, number: int) -> list[Any]:
    """A row's answers.

    Args:
        row: with a list of strings or messages.
        column: its name.
        number: of the row, counted from 0, for error messages.

    Raises:
        UserError: the column is missing, or is not a list of answers.
    """
    responses = row.get(column)
    if not isinstance(responses, list) or not all(isinstance(value, str | list | dict) for value in responses):
        raise UserError(
            f"row {number}: field {column!r}: expected a list of answers (strings or messages), found "
            f"{type(responses).__name__}; the row has {', '.join(map(repr, row)) or 'no fields'}"
        )
    return responses
