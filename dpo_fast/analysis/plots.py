"""Plots of a run, drawn without a display; matplotlib is imported at the first plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels of a run: title, unit of the vertical axis, and names in metrics.jsonl with their names in the legend.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "nats", {"loss": "training", "eval_loss": "held-out pairs"}),
    (
        "Accuracy: chosen reward above rejected",
        "share of pairs",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "held-out pairs"},
    ),
    (
        "Rewards: β × log-ratio to the reference",
        "nats × β",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
    ),
    (
        "Pack fill",
        "share of tokens",
        {"pack_fill": "of the token budget", "padding_share": "padding, of computed tokens"},
    ),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
PANEL_INCHES = (4.8, 3.4)
Interval = tuple[float, float, float]


def plot_metrics(rows: Sequence[Mapping[str, Any]], file: Path | BinaryIO) -> None:
    """Plot loss, accuracy, rewards and pack fill over the optimizer steps.

    Args:
        rows: of a run's `metrics.jsonl` (`dpo_fast.training.metrics.read_metrics`).
        file: .png, .svg or .pdf file to write, or an open file, which gets a .png.

    Raises:
        ValueError: the rows have none of the figures to draw.
    """
    figure, axes = make_figure(2, 2)
    draw_panels(axes, rows)
    figure.savefig(file)


def make_figure(num_rows: int, num_columns: int) -> tuple[Figure, list[Axes]]:
    """A figure without a window, with its axes in reading order."""
    from matplotlib.figure import Figure

    size = (PANEL_INCHES[0] * num_columns, PANEL_INCHES[1] * num_rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6")
        ax.set_axisbelow(True)
    return figure, axes


def draw_panels(axes: Sequence[Axes], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the first of `PANELS`, one on each of the axes.

    Raises:
        ValueError: the rows have none of the figures to draw.
    """
    drawn = [draw_curves(ax, rows, *panel) for ax, panel in zip(axes, PANELS, strict=False)]
    if not any(drawn):
        raise ValueError("nothing to draw: expected rows of metrics.jsonl with 'step' and 'loss' or 'rewards/...'")


def draw_curves(ax: Axes, rows: Sequence[Mapping[str, Any]], title: str, unit: str, names: Mapping[str, str]) -> bool:
    """Draw `names` (name in the rows -> name in the legend) over the steps; False if no row has any of them."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if not points:
            continue
        # Few points need markers: a single point draws no line.
        ax.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if len(points) <= 25 else "", ms=3.5)
    if not ax.lines:
        return False
    if unit.startswith("share"):
        ax.set_ylim(0, 1.05)
    ax.legend(frameon=False, fontsize=9)
    return True


def draw_bars(ax: Axes, title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[Interval]]) -> None:
    """Bars side by side with intervals, for shares.

    Args:
        ax: where to draw.
        title: of the panel.
        unit: of the vertical axis, which runs from 0 to 1.
        groups: labels below the bars; a newline breaks a label.
        series: for each colour of bars (`before`, `after`) one (value, low, high) per group.

    Raises:
        ValueError: a series has another number of bars than there are groups.
    """
    width = 0.8 / len(series)
    for k, (color, (label, intervals)) in enumerate(zip(COLORS, series.items(), strict=False)):
        if len(intervals) != len(groups):
            raise ValueError(f"series {label!r} has {len(intervals)} bars for {len(groups)} groups")
        places = [i + (k - (len(series) - 1) / 2) * width for i in range(len(groups))]
        values = [value for value, _, _ in intervals]
        errors = [
            [max(value - low, 0) for value, low, _ in intervals],
            [max(high - value, 0) for value, _, high in intervals],
        ]
        ax.bar(places, values, 0.92 * width, color=color, label=label)
        ax.errorbar(places, values, errors, fmt="none", ecolor="#333333", elinewidth=1.2, capsize=3)
        for place, value, high in zip(places, values, [high for _, _, high in intervals], strict=True):
            ax.text(place, max(value, high) + 0.02, f"{value:.0%}", ha="center", va="bottom", fontsize=9)
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_ylabel(unit)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(0, 1.3)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.legend(frameon=False, fontsize=9, loc="upper left", ncols=len(series))
