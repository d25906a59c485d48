"""Rows of `dpo-fast inspect` as a terminal's text and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.analysis.pages import render
from dpo_fast.analysis.token_views import AnswerView, RowView, TokenView, probability
from dpo_fast.console import visible

MOST_MOVED = 5
# Blue for gained and orange for lost: told apart by colour-blind readers, too. Three strengths each.
_STYLES = {
    1: ("", "", ""),
    2: ("blue", "", "dark_orange"),
    3: ("bold underline blue", "", "bold underline dark_orange"),
}
_SIGNS = ("⁻", "", "⁺")


def strength(token: TokenView, scale: float) -> float:
    """-1 to 1: the token's log-ratio on the row's scale."""
    return max(-1.0, min(1.0, token.log_ratio / scale))


def token_text(text: str) -> str:
    """Text of tokens with all that does not show as escapes, and tabs marked."""
    return visible(text, strict=True).replace("\t", "⇥\t")


def print_row(view: RowView, console: Console) -> None:
    """Answers in colour (or with signs where there is none), and the figures below."""
    console.print(Text(f"\nrow {view.row}", style="bold"))
    console.print(Text(token_text(view.prompt), style="dim"))
    for answer in view.answers:
        console.print(Text.assemble((f"\n{answer.name}", "bold"), f"  {_summary(answer)}"), soft_wrap=True)
        console.print(coloured(answer, view.scale, signs=console.no_color or console.color_system is None))
        for word, places in zip(("gained most", "lost most"), answer.most_moved(MOST_MOVED), strict=True):
            if places:
                console.print(Text(f"  {word}: {_moved(answer, places)}", style="dim"), soft_wrap=True)
    console.print(_pairs(view))
    for pair in view.pairs:
        console.print(Text(pair.sentence), soft_wrap=True)


def coloured(answer: AnswerView, scale: float, *, signs: bool) -> Text:
    """The answer's text; a token's colour, or number of signs, is its log-ratio."""
    text = Text(token_text(answer.unscored))
    for token in answer.tokens:
        value = strength(token, scale)
        level, side = math.ceil(3 * abs(value)), (value > 0) - (value < 0)
        mark = _SIGNS[side + 1] * (level - 1) if signs and level > 1 else ""
        text.append(token_text(token.text) + mark, style=_STYLES[level][1 - side] if level and not signs else "")
        text.append(token_text(token.context), style="dim")
    return text


def _summary(answer: AnswerView) -> str:
    return (
        f"{len(answer.tokens)} tokens, log-prob {answer.ref_logp:.2f} -> {answer.logp:.2f} "
        f"({answer.log_ratio:+.2f} nats), probability {probability(answer.ref_logp)} -> {probability(answer.logp)}"
    )


def _moved(answer: AnswerView, places: Sequence[int]) -> str:
    texts = [token_text(answer.tokens[i].text) or "part of a character" for i in places]
    return ", ".join(f"{text!r} {answer.tokens[i].log_ratio:+.2f}" for i, text in zip(places, texts, strict=True))


def _pairs(view: RowView) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("pair", "chosen", "rejected", "delta", "beta delta", "P(chosen)", "loss"):
        table.add_column(name, justify="left" if name == "pair" else "right")
    for pair in view.pairs:
        table.add_row(
            f"{pair.chosen.name} > {pair.rejected.name}",
            *(f"{value:+.3f}" for value in (pair.chosen.log_ratio, pair.rejected.log_ratio, pair.delta)),
            f"{pair.beta * pair.delta:+.3f}",
            f"{pair.probability:.1%}",
            f"{pair.loss:.4f}",
        )
    return table


def render_page(views: Sequence[RowView], *, model: str, reference: str, data: str, beta: float) -> str:
    """One self-contained page; every text of model and data is escaped."""
    rows = [
        {
            "view": view,
            "scale": view.scale,
            "answers": [_page_answer(answer, view.scale) for answer in view.answers],
            "prompt": token_text(view.prompt),
        }
        for view in views
    ]
    return render(
        "inspect.html",
        title="Which words gained, which lost",
        rows=rows,
        model=model,
        reference=reference,
        data=data,
        beta=beta,
        probability=probability,
    )


def _page_answer(answer: AnswerView, scale: float) -> dict[str, Any]:
    return {
        "view": answer,
        "unscored": token_text(answer.unscored),
        "tokens": [
            {
                "text": token_text(token.text),
                "context": token_text(token.context),
                "side": "gained" if token.log_ratio >= 0 else "lost",
                "alpha": round(0.75 * abs(strength(token, scale)), 3),
                "is_strong": abs(strength(token, scale)) > 2 / 3,
                "note": f"token {token.id}: p {probability(token.logp)} (reference {probability(token.ref_logp)}), "
                f"log-ratio {token.log_ratio:+.3f} nats",
            }
            for token in answer.tokens
        ],
        "moved": [
            (word, [(*map(token_text, answer.around(i)), answer.tokens[i].log_ratio) for i in places])
            for word, places in zip(("gained", "lost"), answer.most_moved(MOST_MOVED), strict=True)
        ],
    }
