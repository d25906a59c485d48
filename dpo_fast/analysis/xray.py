"""Rows as they are trained on, token by token: what is context, what is scored, what was cut, what inference has.

No model is loaded: the tokenizer and the chat template decide all of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.text import Text

from dpo_fast.analysis.inspection_view import token_text
from dpo_fast.analysis.pages import render
from dpo_fast.analysis.token_views import answer_name, token_pieces
from dpo_fast.config import InspectConfig
from dpo_fast.console import say
from dpo_fast.data.conversation import common_prefix
from dpo_fast.data.load import load_groups
from dpo_fast.data.row_report import CHANGED, DROPPED, DataReport
from dpo_fast.data.trace import Refusal, Trace, trace_rows
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.model.load import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 10
# Text on both sides of a difference.
SHOWN_CHARS = 80
Kind = Literal["context", "scored", "cut"]
_STYLES = {"context": "dim", "scored": "bold green", "cut": "strike red"}
_SIGNS = {"context": ("", ""), "scored": ("⟦", "⟧"), "cut": ("⟪", "⟫")}


@dataclass(frozen=True)
class Token:
    """A token: its id, its text, and what it counts as."""

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class Difference:
    """Where two texts differ: what is around it, what is trained on, what inference has."""

    before: str
    trained: str
    inference: str
    after: str


@dataclass(frozen=True)
class AnswerXray:
    """An answer.

    Attributes:
        name: `chosen`, `rejected`, or its number.
        tokens: all of it, what was cut included.
        difference: where the text differs from what an inference engine would have; None if it does not.
    """

    name: str
    tokens: list[Token]
    difference: Difference | None

    @property
    def num_scored(self) -> int:
        """Tokens that are scored."""
        return sum(token.kind == "scored" for token in self.tokens)


@dataclass(frozen=True)
class RowXray:
    """A row.

    Attributes:
        row: counted from 0.
        place: in its source.
        refusal: why it is left out; empty if it is used.
        weight: factor of its loss.
        prompt: tokens that all answers continue, what was cut included.
        answers: of the row.
        notes: what was done to it.
    """

    row: int
    place: str
    refusal: str
    weight: float
    prompt: list[Token]
    answers: list[AnswerXray]
    notes: list[str]


def xray_rows(config: InspectConfig, *, console: Console | None = None) -> list[RowXray]:
    """Show `config.rows` of `config.data` as they are trained on, in the terminal and, if `out` is given, on a page.

    Raises:
        UserError: a mistake in the settings, or a row that is not there.
    """
    console = console or Console()
    check_settings(config)
    rows = parse_rows(config.rows)
    tokenizer = tokenizer_of(config)
    _, report = load_groups(config, tokenizer)
    say(console, report.render())
    traces = trace_rows(config, tokenizer, rows, count=SHOWN_ROWS)
    found = {trace.source.index for trace in traces}
    if missing := [row for row in rows or () if row not in found]:
        raise UserError(
            f"--rows: {config.data} has no row {missing[0]}; expected 0 to {report.rows_read - 1}, counted from 0"
        )
    views = [xray(trace, tokenizer) for trace in traces]
    for view in views:
        print_xray(view, console)
    if config.out is not None:
        write_file_atomically(Path(config.out), render_xray(views, report, model=config.model))
        say(console, f"page: {config.out}")
    return views


def check_settings(config: InspectConfig) -> None:
    """Refuse what `dpo-fast inspect` cannot do.

    Raises:
        UserError: no data, or an output of another kind.
    """
    if not config.data:
        raise UserError("no data given: pass --data with a file of preference rows or a Hub dataset's name")
    if config.out is not None and Path(config.out).suffix != ".html":
        raise UserError(f"--out {config.out}: expected a file that ends in .html")


def parse_rows(rows: list[int] | str | None) -> list[int] | None:
    """Numbers of rows, from a list or from text such as `0-20` or `3, 5-7`.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(rows, str):
        return rows
    found: list[int] = []
    for part in rows.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--rows {rows}: expected row numbers, such as 0-20, 3,5-7 or [0, 5]")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def xray(trace: Trace | Refusal, tokenizer: PreTrainedTokenizerBase) -> RowXray:
    """Everything that is shown of a row."""
    row, place = trace.source.index, trace.source.place
    if isinstance(trace, Refusal):
        detail = f": {trace.error}" if str(trace.error) else ""
        return RowXray(row, place, DROPPED[trace.error.cause] + detail, 1.0, [], [], [])
    group = trace.group
    notes = [CHANGED[cause] + (f": {message}" if message else "") for cause, message in trace.changes.items()]
    # The start of the prompt may have been cut, but for its first token.
    kept = group.prompt_ids.tolist()
    lost = len(trace.tokens.prompt) - len(kept)
    first = 1 if lost and len(kept) > 1 and kept[0] == trace.tokens.prompt[0] == tokenizer.bos_token_id else 0
    context: list[Kind] = ["context"]
    cut: list[Kind] = ["cut"]
    kinds = context * first + cut * lost + context * (len(kept) - first)
    prompt = _tokens(trace.tokens.prompt, kinds, [], tokenizer)
    answers = [_answer(trace, number, tokenizer) for number in range(len(group.answers))]
    return RowXray(row, place, "", group.ranking.weight, prompt, answers, notes)


def _answer(trace: Trace, number: int, tokenizer: PreTrainedTokenizerBase) -> AnswerXray:
    group, cut = trace.group, trace.cut(number)
    ids = group.answers[number].tolist()
    scored = set(group.targets(number).tolist())
    kinds: list[Kind] = ["scored" if i in scored else "context" for i in range(len(ids))]
    kinds += ["cut"] * len(cut)
    place = trace.answer_of(number)
    inference = trace.rendered.inference[place]
    difference = None if inference is None else _difference(trace.rendered.wholes[place], inference)
    tokens = _tokens([*ids, *cut], kinds, trace.tokens.prompt, tokenizer)
    return AnswerXray(answer_name(group, number), tokens, difference)


def _tokens(
    ids: Sequence[int], kinds: Sequence[Kind], before: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Token]:
    pieces = token_pieces(ids, before, tokenizer)
    return [Token(*token) for token in zip(ids, pieces, kinds, strict=True)]


def _difference(trained: str, inference: str) -> Difference:
    start = common_prefix(trained, inference)
    rest = trained[start:][::-1], inference[start:][::-1]
    end = common_prefix(*rest)
    own, other = (text[end:][::-1] for text in rest)
    before, after = trained[:start], trained[len(trained) - end :]
    before = f"...{before[-SHOWN_CHARS:]}" if len(before) > SHOWN_CHARS else before
    after = f"{after[:SHOWN_CHARS]}..." if len(after) > SHOWN_CHARS else after
    return Difference(before, own, other, after)


def print_xray(view: RowXray, console: Console) -> None:
    """Tokens with bars between them, scored ones green (or in double brackets where there is no colour)."""
    signs = console.no_color or console.color_system is None
    console.print(Text(f"\nrow {view.row} ({view.place})", style="bold"), soft_wrap=True)
    if view.refusal:
        console.print(Text(f"left out: {view.refusal}"), soft_wrap=True)
        return
    if view.weight != 1:
        console.print(Text(f"weight {view.weight:g}"))
    for note in view.notes:
        console.print(Text(f"changed: {note}"), soft_wrap=True)
    console.print(_text(view.prompt, signs=signs), soft_wrap=True)
    for answer in view.answers:
        head = f"{answer.num_scored} of {len(answer.tokens)} tokens scored"
        console.print(Text.assemble((f"\n{answer.name}", "bold"), f"  {head}"), soft_wrap=True)
        console.print(_text(answer.tokens, signs=signs), soft_wrap=True)
        difference = answer.difference
        if difference is None:
            console.print(Text("inference has the same text", style="dim"))
            continue
        own, other = shown(difference.trained), shown(difference.inference)
        text = Text.assemble(
            ("at inference  ", "bold"),
            (shown(difference.before), "dim"),
            *((f"[-{own}-]", "strike red"),) * bool(own),
            *((f"{{+{other}+}}", "bold blue"),) * bool(other),
            (shown(difference.after), "dim"),
        )
        console.print(text, soft_wrap=True)


def _text(tokens: Sequence[Token], *, signs: bool) -> Text:
    text = Text()
    for kind, run in groupby(tokens, lambda token: token.kind):
        left, right = _SIGNS[kind] if signs else ("", "")
        joined = "│".join(shown(token.text) for token in run)
        text.append(f"{'│' if text else ''}{left}{joined}{right}", style="" if signs else _STYLES[kind])
    return text


def shown(text: str) -> str:
    """Text with line breaks and control characters visible."""
    return token_text(text.replace("\n", "↵\n"))


def render_xray(views: Sequence[RowXray], report: DataReport, *, model: str) -> str:
    """One self-contained page; every text of tokenizer and data is escaped."""
    return render("xray.html", title="Rows as they are trained on", rows=views, report=report, model=model, shown=shown)
