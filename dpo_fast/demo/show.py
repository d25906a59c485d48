"""What a demo prints and plots."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dpo_fast.analysis.intervals import Estimate
from dpo_fast.analysis.plots import draw_bars, draw_panels, make_figure
from dpo_fast.demo.task import parses

INTRODUCTION = (
    "A preference pair is one prompt with two answers, one better than the other: here, one parses as JSON, one does "
    "not. DPO moves probability from the worse to the better, and keeps the model close to the one it started from."
)
RATE_LABELS = {
    "sampled_parse": "sampled answers that parse",
    "greedy_parse": "greedy answers that parse",
    "sampled_right": "sampled answers with the right contents",
}


def command_line(name: str, config: Any) -> str:
    """The command that does what `config` says; settings at their defaults are omitted."""
    words = [f"dpo-fast {name}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", shlex.quote(json.dumps(value) if isinstance(value, list) else str(value))]
    return " ".join(words)


def figures_table(summary: dict[str, Any]) -> Table:
    """Shares before and after training."""
    table = Table(title="on held-out prompts, with 95% intervals", title_justify="left", box=box.SIMPLE)
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, label in RATE_LABELS.items():
        table.add_row(label, *(Estimate(**summary[when][name]).percent() for when in ("before", "after")))
    return table


def samples_table(rows: list[dict[str, Any]]) -> Table:
    """The first sampled answer of both models to some prompts, side by side."""
    table = Table(title="sampled answers", title_justify="left", box=box.SIMPLE)
    for name in ("prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(Text(row["prompt"]), *(_marked(row[side][0]["text"]) for side in ("reference", "model")))
    return table


def _marked(answer: str) -> Text:
    """The answer, green with a tick if it parses, else red with a cross."""
    return Text(f"✓{answer}", style="green") if parses(answer) else Text(f"✗{answer}", style="red")


def conclusion(summary: dict[str, Any]) -> str:
    """What changed and what it cost."""
    beta, pairs = summary["dpo"]["beta"], summary["held_out_pairs"]
    chosen, rejected = (pairs[f"reward_{side}"]["value"] / beta for side in ("chosen", "rejected"))
    return (
        f"What changed: of the base model's own answers in held-out pairs, DPO moved the parsing ones by "
        f"{chosen:+.2f} nats and the broken ones by {rejected:+.2f}. What it cost: the model is "
        f"{summary['kl_to_base']['value']:.2f} nats per answer away from the base model (KL)."
    )


def plot_demo(summary: dict[str, Any], metrics: list[dict[str, Any]], path: Path) -> None:
    """Plot the run's curves and the rates before and after."""
    figure, axes = make_figure(2, 2)
    draw_panels(axes[:3], metrics)
    series = {
        when: [tuple(summary[when][name][key] for key in ("value", "low", "high")) for name in RATE_LABELS]
        for when in ("before", "after")
    }
    draw_bars(
        axes[3],
        "Answers to held-out prompts",
        "share of answers",
        [label.replace(" that ", "\nthat ").replace(" with ", "\nwith ") for label in RATE_LABELS.values()],
        series,
    )
    figure.savefig(path)
