"""Rows -> what a person sees of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from dpo_fast.config import DataConfig, LabelConfig
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.rows import Row, report_dropped, responses_of
from dpo_fast.data.formats import to_preference, to_prompt
from dpo_fast.data.row_report import DROPPED, RowError
from dpo_fast.errors import UserError

_CHOSEN, _REJECTED = DataConfig.chosen_column, DataConfig.rejected_column


@dataclass(frozen=True)
class Item:
    """A row whose answers can be compared.

    Attributes:
        row: with a prompt and a list of answers; the result adds columns to it.
        prompt: (role, text) of each message; a prompt that is a string has an empty role.
        answers: their texts.
    """

    row: Row
    prompt: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]


def to_items(rows: Sequence[Row], config: LabelConfig, console: Console) -> list[Item]:
    """The rows that can be judged; the others are dropped and counted, and the first of them is named.

    Raises:
        UserError: no row can be judged.
    """
    items: list[Item] = []
    refused: list[str] = []
    for number, row in enumerate(rows):
        try:
            items.append(_item(row, number, config))
        except RowError as error:
            refused.append(f"row {number}: {str(error) or DROPPED[error.cause]}")
        except UserError as error:
            refused.append(str(error))
    report_dropped(console, refused)
    if not items:
        raise UserError(f"--data {config.data}: no row can be judged: {refused[0]}")
    return items


def _item(row: Row, number: int, config: LabelConfig) -> Item:
    if row.get(config.responses_column) is None and row.get(_CHOSEN) is not None:
        row = _from_pair(row, config)
    answers = responses_of(row, config.responses_column, number)
    if not all(isinstance(m, dict) for answer in answers if isinstance(answer, list) for m in answer):
        raise RowError("wrong_type", f"field {config.responses_column!r}: expected strings or messages")
    prompt, _ = to_prompt(row, DataConfig(prompt_column=config.prompt_column, system_column=config.system_column))
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        # Half a surrogate pair, or a date from a columnar file: better to drop the row now than to fail on the result.
        raise RowError("wrong_type", f"cannot be written as JSON: {error}") from error
    shown = [("", prompt)] if isinstance(prompt, str) else [(m["role"], text_of(m)) for m in prompt]
    return Item(row, tuple(shown), tuple(map(text_of, answers)))


def _from_pair(row: Row, config: LabelConfig) -> Row:
    """Both answers as `responses`; their old columns go, since training would trust them over any score."""
    found = to_preference(row, DataConfig(prompt_column=config.prompt_column), has_chat_template=False)
    if found.prompt is None:
        raise RowError("missing_field", f"field {config.prompt_column!r} is missing; --prompt_column maps another name")
    kept: dict[str, Any] = {name: row[name] for name in row if name not in (_CHOSEN, _REJECTED, "conversations")}
    return kept | {config.prompt_column: found.prompt, config.responses_column: list(found.answers)}
