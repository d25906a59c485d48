"""The figures of `dpo-fast eval` as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dpo_fast.analysis.answer_figures import SIDES
from dpo_fast.analysis.intervals import Estimate


def pairs_table(figures: dict[str, Any]) -> Table:
    """What `pair_figures` found."""
    table = _table(f"{figures['pairs']} held-out pairs, with 95% intervals", "", "value")
    for name, label in (
        ("accuracy", "accuracy: chosen reward above rejected"),
        ("margin", "margin: chosen minus rejected reward"),
        ("reward_chosen", "chosen reward"),
        ("reward_rejected", "rejected reward"),
        ("loss", "loss"),
        ("policy_prefers_chosen", "chosen answer is likelier under the model"),
        ("reference_prefers_chosen", "chosen answer is likelier under the reference"),
    ):
        table.add_row(label, _value(figures[name]))
    found = figures["calibration"]
    table.add_row("calibration error, Brier score", f"{found['ece']:.3f}, {found['brier']:.3f}")
    return table


def answers_table(figures: dict[str, Any]) -> Table:
    """What `answer_figures` found."""
    title = f"{figures['answers']} answers per model to {figures['prompts']} prompts, with 95% intervals"
    table = _table(title, "", *SIDES, "rise")
    for name, found in (("score", figures["score"]), *figures["signals"].items()):
        cells = ["not judged"] * 3 if found is None else [_value(found[column]) for column in (*SIDES, "rise")]
        table.add_row(Text(name), *cells)
    counts = f"{figures['wins']} won, {figures['ties']} tied, {figures['losses']} lost"
    table.add_row("win rate", _value(figures["win_rate"]), "", counts)
    if "kl" in figures:
        table.add_row("KL from the reference, nats per answer", _value(figures["kl"]), "", "")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    return table


def _value(found: dict[str, float]) -> str:
    estimate = Estimate(**found)
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
