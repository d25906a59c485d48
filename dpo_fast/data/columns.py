"""What the columns of a row mean, whatever they are called.

A row is read through `Row`, which remembers what was read. The report lists the rest: a column that is ignored without
a word may be the prompt.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from typing import Any

from dpo_fast.config import DataConfig
from dpo_fast.data.row_report import RowError

# Other names of the prompt, read only if the column that --prompt_column names is not there and was not chosen.
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "query", "instruction", "input")
SYSTEM = ("system_prompt", "system_message")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Arguments of `apply_chat_template` that are set here.
RESERVED_KWARGS = ("messages", "conversation", "tools", "add_generation_prompt", "tokenize", "chat_template")
# Text that describes a row and is no part of it.
_METADATA = re.compile(
    r"(.*_)?(id|uid|uuid|idx|index|hash|source|sources|dataset|subset|split|category|topic|domain|type|kind|lang|"
    r"language|locale|model|models|name|annotator|url|date|time|timestamp|licen[cs]e|label|labels|tag|tags|score|scores|"
    r"rating|ratings|rank|margin|reason|rationale|comment|version|status|provider|generator)(_(chosen|rejected))?",
    re.IGNORECASE,
)


class Row:
    """A row's columns, and which of them were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._read: set[str] = set()

    def get(self, name: str | None) -> Any:
        """The column's value; None if there is no such column."""
        if name is None:
            return None
        self._read.add(name)
        return self.values.get(name)

    def require(self, name: str) -> Any:
        """The column's value.

        Raises:
            RowError: it is missing or null.
        """
        value = self.get(name)
        if value is None:
            raise RowError(
                "missing_field",
                f"field {name!r} is missing; the row has {_quoted(self.values) or 'none'}. "
                "--chosen_column, --rejected_column and --prompt_column map other names",
            )
        return value

    def number(self, name: str) -> float:
        """The column's finite number.

        Raises:
            RowError: it is missing or something else.
        """
        value = self.require(name)
        if isinstance(value, bool) or not is_number(value):
            raise RowError("wrong_type", f"field {name!r}: expected a finite number, found {value!r:.40}")
        return float(value)

    @property
    def unread(self) -> tuple[str, ...]:
        """Columns that hold something and were not read."""
        return tuple(n for n, value in self.values.items() if n not in self._read and value not in (None, "", [], {}))

    @property
    def unread_text(self) -> list[str]:
        """Those of them that may be a prompt: text or messages, under a name that does not say otherwise."""
        return [
            name
            for name in self.unread
            if not _METADATA.fullmatch(name)
            and (
                isinstance(value := self.values[name], str) or (isinstance(value, list) and isinstance(value[0], dict))
            )
        ]


def is_number(value: Any) -> bool:
    """Whether it is a finite number that fits a float; JSON may write one of 400 digits."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def find_prompt(row: Row, config: DataConfig) -> Any:
    """The prompt: a string, messages, or None if the answers hold it.

    Raises:
        RowError: several columns may be the prompt, or the one that was chosen is missing.
    """
    prompt = row.get(config.prompt_column)
    if prompt == []:
        prompt = None
    if prompt is not None or not config.prompt_column:
        return prompt
    if config.prompt_column != DataConfig.prompt_column:
        return row.require(config.prompt_column)
    for name in CONVERSATIONS:
        if isinstance(row.values.get(name), list):
            return row.get(name)
    found = [name for name in QUESTIONS if row.values.get(name)]
    if found == ["instruction", "input"]:
        parts = [row.get(name) for name in found]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    if len(found) > 1:
        raise RowError(
            "missing_field",
            f"fields {_quoted(found)} may each be the prompt; name the one that is with --prompt_column",
        )
    return row.get(found[0]) if found else None


def check_prompt_is_nowhere(row: Row, config: DataConfig) -> None:
    """Refuse a row of answers without a prompt if a column that nothing reads may hold it.

    Raises:
        RowError: it names these columns.
    """
    if not config.prompt_column or not (names := row.unread_text):
        return
    raise RowError(
        "missing_field",
        f"field {config.prompt_column!r} is missing, and {_quoted(names)} may hold the prompt: name it with "
        f"--prompt_column (such as --prompt_column {names[0]}), or pass --prompt_column '' if the answers hold it",
    )


def find_system(row: Row, config: DataConfig) -> str | None:
    """The text of the system turn; None if there is no such column.

    Raises:
        RowError: it is no text.
    """
    name = config.system_column
    if name is not None and name == DataConfig.system_column and row.values.get(name) is None:
        name = next((other for other in SYSTEM if row.values.get(other) is not None), name)
    system = row.get(name)
    if system is not None and not isinstance(system, str):
        raise RowError("wrong_type", f"field {name!r}: expected the text of the system turn, found {_kind(system)}")
    return system


def find_tools(row: Row, column: str) -> list[Any] | None:
    """Tools for the chat template: a list of JSON schemas, or JSON text of one.

    Raises:
        RowError: it is something else.
    """
    tools = _json_of(row, column)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("wrong_type", f"field {column!r}: expected a list of tools, each a JSON schema")
    return tools or None


def find_template_kwargs(row: Row, config: DataConfig) -> dict[str, Any]:
    """What the chat template is given besides messages and tools: the run's settings, then the row's.

    Raises:
        RowError: it is no object, or sets what is not its to set.
    """
    column = config.chat_template_kwargs_column
    own = _json_of(row, column) or {}
    if not isinstance(own, dict):
        raise RowError("wrong_type", f"field {column!r}: expected an object of names and values, found {_kind(own)}")
    if reserved := [name for name in own if name in RESERVED_KWARGS]:
        raise RowError("wrong_type", f"field {column!r}: {_quoted(reserved)} cannot be set there")
    return (config.chat_template_kwargs or {}) | own


def refuse_media(row: Row) -> None:
    """Refuse a row with images, video or sound: its text alone is not what its author meant.

    Raises:
        RowError: it has some.
    """
    for name in MEDIA:
        if row.values.get(name):
            raise RowError(
                "media", f"field {name!r}: leave such rows out, or drop the column to train on their text alone"
            )


def near_miss(name: str, config: DataConfig) -> str | None:
    """The known column that a name nobody reads is probably a slip of."""
    if _METADATA.fullmatch(name):
        return None
    known = [value for field, value in vars(config).items() if field.endswith("_column") and value]
    known += [*CONVERSATIONS, *QUESTIONS, *SYSTEM, *MEDIA]
    found = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.75)
    return found[0] if found else None


def _json_of(row: Row, column: str | None) -> Any:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError("wrong_type", f"field {column!r}: not valid JSON: {error.msg}") from error


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names))


def _kind(value: Any) -> str:
    return type(value).__name__
