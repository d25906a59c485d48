"""A plan in the terminal, 80 columns wide, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_fast.planning.choose import Planned
from dpo_fast.planning.hardware import GIB

WIDTH = 80
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "state": "#009E73",
    "activations": "#D55E00",
    "head": "#E69F00",
    "packs": "#F0E442",
    "sharding": "#CC79A7",
    "reserve": "#BBBBBB",
}


def number(gib: float) -> str:
    """Two digits after the point, or two that count."""
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def parts_gib(planned: Planned) -> dict[str, float]:
    """GiB by part, the reserve among them."""
    return planned.parts.gib() | {"reserve": planned.reserve / GIB}


def parts_line(planned: Planned) -> str:
    """`weights 14.96, gradients 0.98, ... GiB`, the largest first, trifles left out."""
    parts = sorted(planned.parts.gib().items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number(gib)}" for name, gib in parts if _counts(gib, planned)) + " GiB"


def _counts(gib: float, planned: Planned) -> bool:
    return gib * GIB >= 0.002 * planned.parts.total


def one_line(planned: Planned) -> str:
    """The plan of a run in a line."""
    return (
        f"planned: {number(planned.parts.total / GIB)} of {planned.card.memory / GIB:.1f} GiB "
        f"({parts_line(planned)}), {planned.time.total:.2g} s per step, {planned.pairs_per_second:.2g} pairs/s"
    )


def way_out(other: Planned, than: Planned) -> str:
    """The options to change, and what they give."""
    options = " ".join(f"--{name} {str(value).lower()}" for name, value in other.changes(than).items())
    cost = other.pairs_per_second / than.pairs_per_second
    return f"{options}: {number(other.parts.total / GIB)} GiB, {cost:.2f}x the speed"


def render(planned: Planned) -> str:
    """The table of a setting alone."""
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(_parts_table(planned))
    return str(console.file.getvalue().rstrip("\n"))  # type: ignore[attr-defined]


def show(console: Console, planned: Planned, others: Sequence[Planned], *, asked: Planned) -> None:
    """Print a plan: setting, parts, time, and the next-best settings."""
    setting, card = planned.setting, planned.card
    gpus = f"{setting.gpus} x {card.name}" if setting.gpus > 1 else card.name
    shape = planned.shape
    lines = [f"{shape.name}: {shape.num_parameters / 1e9:.3g}e9 parameters on {gpus}"]
    if planned.missing:
        lines += [f"Planned only: `dpo-fast train` does not do {planned.missing} yet."]
    changes = planned.changes(asked)
    chosen = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
    if not planned.fits:
        lines += ["Does not fit."]
    elif chosen:
        lines += [f"Does not fit as set; the fastest that fits: {chosen}"]
    else:
        lines += ["Fits as set."]
    if planned.tier == 3:
        lines += ["Most steps at DPO's learning rates round to nothing on such weights."]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print(_parts_table(planned))
    pairs = planned.pairs_per_second
    console.print(
        f"{planned.time.total:.3g} s per step, {pairs:.3g} pairs/s, {86_400 * pairs:,.0f} pairs per day (planned)",
        highlight=False,
    )
    if others:
        console.print(_others_table(planned, others))


def show_ways_out(console: Console, planned: Planned, ways: Sequence[Planned], cards: Sequence[str]) -> None:
    """What would fit instead of a plan that does not."""
    lines = [way_out(way, planned) for way in ways] + [f"--gpu {name}" for name in cards]
    for line in lines or ["neither a cheaper setting nor a larger card; try --gpus 8 or --peft qlora"]:
        console.print(f"would fit: {line}" if lines else line, markup=False, highlight=False)


def _parts_table(planned: Planned) -> Table:
    table = Table(box=None, pad_edge=False, width=WIDTH)
    table.add_column("memory", width=12)
    table.add_column("GiB", justify="right", width=8)
    table.add_column("", width=WIDTH - 26)
    memory = planned.card.memory / GIB
    parts = parts_gib(planned)
    for name, gib in parts.items():
        if _counts(gib, planned):
            table.add_row(name, number(gib), "█" * round(min(gib / memory, 1) * (WIDTH - 26)))
    needed = sum(parts.values())
    table.add_row("needed", f"{needed:.2f}", f"{'fits in' if planned.fits else 'does not fit in'} {memory:.1f}")
    return table


def _others_table(planned: Planned, others: Sequence[Planned]) -> Table:
    table = Table(box=None, pad_edge=False, width=WIDTH, title_justify="left", title="\nother settings")
    table.add_column("change", ratio=1)
    table.add_column("GiB", justify="right", width=7)
    table.add_column("pairs/s", justify="right", width=8)
    table.add_column("speed", justify="right", width=6)
    table.add_column("", width=4)
    for other in others:
        change = " ".join(f"--{name} {str(value).lower()}" for name, value in other.changes(planned).items())
        speed = other.pairs_per_second / planned.pairs_per_second
        row = (change, f"{other.parts.total / GIB:.1f}", f"{other.pairs_per_second:.3g}", f"{speed:.2f}x")
        table.add_row(*row, "" if other.fits else "no")
    return table


def draw(planned: Planned, others: Sequence[Planned], path: Path) -> None:
    """Bars of memory by part, for the plan and for the others, against the card's memory."""
    from matplotlib.figure import Figure

    shown = [planned, *others]
    labels = ["the plan"] + [
        "\n".join(f"{name} {str(value).lower()}" for name, value in other.changes(planned).items()) for other in others
    ]
    figure = Figure(figsize=(9, 1.6 + 0.75 * len(shown)), dpi=130, layout="constrained")
    ax = figure.subplots()
    left = [0.0] * len(shown)
    for name, color in COLORS.items():
        sizes = [parts_gib(other)[name] for other in shown]
        if max(sizes) >= 0.01:
            ax.barh(labels, sizes, left=left, color=color, label=name, height=0.62)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory = planned.card.memory / GIB
    ax.axvline(memory, color="black", linewidth=1)
    ax.annotate(f" {memory:.1f} GiB", (memory, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center")
    for place, (end, other) in enumerate(zip(left, shown, strict=True)):
        ax.annotate(f"  {other.pairs_per_second:.3g} pairs/s", (max(end, memory), place), va="center", fontsize=9)
    ax.set_xlim(0, 1.2 * max(*left, memory))
    ax.invert_yaxis()
    ax.set_xlabel("GiB at the peak of a step (planned)")
    ax.set_title(f"{planned.shape.name} on {planned.setting.gpus} x {planned.card.name}", loc="left", pad=18)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=8, frameon=False, fontsize=9)
    figure.savefig(path)
