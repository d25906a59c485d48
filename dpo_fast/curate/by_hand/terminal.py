"""The queue in a terminal or through a pipe: one line of input per judgement."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.console import visible
from dpo_fast.curate.by_hand.items import Item
from dpo_fast.curate.by_hand.session import Choice, JudgingSession
from dpo_fast.errors import WriteError

_WORDS: dict[str, Choice] = {"l": "left", "1": "left", "r": "right", "2": "right", "t": "tie", "0": "tie", "s": "skip"}
_ASK = "[l] left is better  [r] right  [t] tie  [s] skip  [u] undo  [q] quit > "
_ASK_AT_THE_END = "all is judged: [Enter] quit  [u] undo > "
# In a narrower terminal, two columns are harder to read than one answer below the other.
_SIDE_BY_SIDE = 100


def judge_in_terminal(session: JudgingSession, console: Console) -> None:
    """Ask until all is judged, `q` is typed, or the input ends."""
    shown: int | None = None
    while True:
        place = session.place
        if place != shown:
            _print(session, console)
            shown = place
        try:
            ask = _ASK_AT_THE_END if session.is_finished else _ASK
            word = console.input(Text(ask)).strip().lower()
        except EOFError:
            console.print()
            return
        if word == "q" or (session.is_finished and not word):
            return
        _apply(word, place, session, console)


def _apply(word: str, place: int, session: JudgingSession, console: Console) -> None:
    try:
        if word == "u" and session.can_undo:
            session.undo(place)
        elif word in _WORDS and not session.is_finished:
            session.judge(place, _WORDS[word])
        else:
            console.print(Text("nothing to undo" if word == "u" else "expected one of l, r, t, s, u, q"))
    except WriteError as error:
        console.print(Text(f"not saved, so it does not count: {error}"))


def _print(session: JudgingSession, console: Console) -> None:
    console.rule(Text(session.progress().render()))
    shown = session.show()
    if shown is None:
        return
    item, left, right = shown
    for role, text in _prompt(item):
        console.print(Text(role, style="bold"), Text(text), "", sep="\n")
    if console.width >= _SIDE_BY_SIDE:
        table = Table(expand=True)
        for name in ("left", "right"):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(Text(_answer(left)), Text(_answer(right)))
        console.print(table)
        return
    for name, text in (("left", left), ("right", right)):
        console.rule(Text(name), align="left")
        console.print(Text(_answer(text)))


def _prompt(item: Item) -> list[tuple[str, str]]:
    return [(visible(role) or "prompt", visible(text)) for role, text in item.prompt]


def _answer(text: str) -> str:
    return visible(text) or "(empty)"
