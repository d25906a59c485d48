"""What becomes of single rows on their way to tokens, each step kept: what `dpo-fast inspect` shows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_fast.config import DataConfig
from dpo_fast.data.load import recognise
from dpo_fast.data.render import Rendered
from dpo_fast.data.row_report import RowError
from dpo_fast.data.rows import SourceRow, read_rows
from dpo_fast.data.tokenize import PairTokenizer, Tokens, truncate
from dpo_fast.packs.layout import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trace:
    """A row that is used.

    Attributes:
        source: where it was read.
        rendered: its text.
        tokens: before truncation.
        group: after it.
        changes: what was done to it (`row_report.CHANGED`), each with a message.
    """

    source: SourceRow
    rendered: Rendered
    tokens: Tokens
    group: Group
    changes: dict[str, str]

    def answer_of(self, number: int) -> int:
        """The place among `rendered.wholes` of an answer of the group; answers like others may have been left out."""
        ids = self.group.answers[number].tolist()
        starts = (place for place, answer in enumerate(self.tokens.answers) if answer[: len(ids)] == ids)
        return self.tokens.numbers[next(starts)]

    def cut(self, number: int) -> list[int]:
        """Ids that an answer of the group lost to `max_length`."""
        whole = self.tokens.answers[self.tokens.numbers.index(self.answer_of(number))]
        return whole[len(self.group.answers[number]) :]


@dataclass(frozen=True)
class Refusal:
    """A row that is left out, and why."""

    source: SourceRow
    error: RowError


def trace_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: Collection[int] | None, *, count: int
) -> list[Trace | Refusal]:
    """Trace rows of `config.data`, used or not.

    Args:
        config: as for `load_groups`.
        tokenizer: of the model.
        rows: numbers counted from 0; None for the first `count`.
        count: see there.
    """
    tokenize = PairTokenizer(tokenizer, config)
    wanted = None if rows is None else set(rows)
    last = count if wanted is None else max(wanted, default=-1) + 1
    limit = last if config.max_rows is None else min(last, config.max_rows)
    source = read_rows(config.data, limit)
    return [_trace(row, config, tokenize) for row in source if wanted is None or row.index in wanted]


def _trace(row: SourceRow, config: DataConfig, tokenize: PairTokenizer) -> Trace | Refusal:
    try:
        preference = recognise(row, config, tokenize.tokenizer)
        rendered = tokenize.render(preference)
        (tokens,) = tokenize.tokens([preference], [rendered])
        if isinstance(rendered, RowError):
            raise rendered
        if isinstance(tokens, RowError):
            raise tokens
        group, changes = truncate(tokens, row.index, config, tokenize.bos)
    except RowError as error:
        return Refusal(row, error)
    if row.has_duplicate_keys:
        changes["duplicate_keys"] = ""
    return Trace(row, rendered, tokens, group, changes)
