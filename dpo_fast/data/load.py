"""The whole way from a source to groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from dpo_fast.config import DataConfig
from dpo_fast.data.columns import near_miss
from dpo_fast.data.formats import Preference, to_preference
from dpo_fast.data.pair_totals import excerpt
from dpo_fast.data.row_report import DROPPED, DataReport, RowError
from dpo_fast.data.rows import SourceRow, read_rows
from dpo_fast.data.tokenize import PairTokenizer, truncate
from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows tokenized by one call: enough for the tokenizer's threads, little memory.
ROWS_AT_ONCE = 512


def load_groups(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Group], DataReport]:
    """Read `config.data` and tokenize it.

    Returns:
        Groups in the order of the rows, and what became of every row.

    Raises:
        UserError: the source cannot be read, no row is usable, or (with `strict`) the first row that is dropped.
    """
    report = DataReport(config.data)
    groups: list[Group] = []
    tokenize = PairTokenizer(tokenizer, config)
    rows = read_rows(config.data, config.max_rows)
    while block := list(islice(rows, ROWS_AT_ONCE)):
        report.rows_read += len(block)
        known = list(_recognised(block, config, report, tokenizer))
        for (row, preference), tokens in zip(known, tokenize([preference for _, preference in known]), strict=True):
            try:
                if isinstance(tokens, RowError):
                    raise tokens
                group, changes = truncate(tokens, row.index, config, tokenize.bos)
            except RowError as error:
                _drop(row, error, config, report)
                continue
            groups.append(group)
            report.example = report.example or excerpt(group, tokenizer)
            is_plain = config.apply_chat_template is None and not preference.is_chat and bool(tokenizer.chat_template)
            notes = report.totals.add(group, tokenizer, tokenize.end_tokens) + ["plain_text"] * is_plain
            for cause, message in (changes | dict.fromkeys(notes, "")).items():
                report.count(cause, row.place, message)
    report.finish(groups)
    if not groups:
        raise UserError(f"--data {config.data}: no usable rows\n{report.render()}")
    return groups, report


def recognise(row: SourceRow, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Preference:
    """What a row says.

    Raises:
        RowError: it cannot be read, or is of no known form.
    """
    if row.error:
        raise RowError("broken_json", row.error)
    return to_preference(row.value, config, has_chat_template=bool(tokenizer.chat_template))


def _recognised(
    rows: list[SourceRow], config: DataConfig, report: DataReport, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[SourceRow, Preference]]:
    for row in rows:
        try:
            preference = recognise(row, config, tokenizer)
        except RowError as error:
            _drop(row, error, config, report)
            continue
        if row.has_duplicate_keys:
            report.count("duplicate_keys", row.place)
        for name in preference.unused:
            if name not in report.unused:
                report.unused[name] = near_miss(name, config)
        yield row, preference


def _drop(row: SourceRow, error: RowError, config: DataConfig, report: DataReport) -> None:
    if config.strict:
        detail = f": {error}" if str(error) else ""
        raise UserError(
            f"--data {config.data}, {row.place}: {DROPPED[error.cause]}{detail}. Mend or remove the row, or leave "
            "--strict out to drop such rows"
        )
    report.count(error.cause, row.place, str(error))
