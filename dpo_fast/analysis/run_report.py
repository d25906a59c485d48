"""`dpo-fast report`: a run's folder -> report.html, a single file with settings, curves, figures and warnings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dpo_fast.analysis.pages import render
from dpo_fast.analysis.plots import plot_metrics
from dpo_fast.config import DPOConfig, ReportConfig
from dpo_fast.console import say
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.training.metrics import METRICS_FILE, read_metrics

CONFIG_FILE, PLOT = "config.yaml", "report.png"
# Names in metrics.jsonl -> names on the page and number formats.
FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "rewards/accuracies": ("accuracy: chosen reward above rejected", "{:.1%}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "rewards/chosen": ("chosen reward", "{:+.4f}"),
    "rewards/rejected": ("rejected reward", "{:+.4f}"),
    "logps/chosen": ("log-prob of chosen answers, nats", "{:.1f}"),
    "logps/rejected": ("log-prob of rejected answers, nats", "{:.1f}"),
    "grad_norm": ("gradient norm", "{:.3g}"),
    "learning_rate": ("learning rate", "{:.2e}"),
}
SPEEDS = {
    "tokens_per_second": ("tokens per second", "{:,.0f}"),
    "pairs_per_second": ("pairs per second", "{:.3g}"),
    "pack_fill": ("pack fill", "{:.1%}"),
    "peak_memory_gib": ("peak memory, GiB", "{:.2f}"),
}


def write_report(config: ReportConfig, *, console: Console | None = None) -> Path:
    """Write the page on `config.run`, and its curves as `report.png` in that folder; no model is loaded.

    Raises:
        UserError: the folder is not that of a run, or has nothing to draw.
    """
    console = console or Console()
    run = Path(config.run)
    if not config.run or not run.is_dir():
        raise UserError(f"dpo-fast report {config.run}: no such folder; expected a run's output_dir")
    rows = read_metrics(run / METRICS_FILE)
    training = [row for row in rows if "loss" in row]
    if not training:
        raise UserError(
            f"dpo-fast report {run}: has no {METRICS_FILE} with training steps; expected a run's output_dir"
        )
    out = Path(config.out) if config.out is not None else run / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out}: expected a file that ends in .html")
    plot = BytesIO()
    plot_metrics(rows, plot)
    write_file_atomically(run / PLOT, plot.getvalue())
    page = render(
        "report.html",
        title=f"Run {run.name}",
        run=str(run),
        settings=changed_settings(run / CONFIG_FILE),
        training=figure_rows(training),
        held_out=figure_rows([_without_prefix(row) for row in rows if "eval_loss" in row]),
        speeds=[(name, form.format(training[-1][key])) for key, (name, form) in SPEEDS.items() if key in training[-1]],
        last_step=rows[-1]["step"],
        is_finished=(run / "final").is_dir(),
        checkpoints=sorted((path.name for path in run.glob("checkpoint-*")), key=_step_of),
        warnings=[(row["step"], text) for row in rows for text in row.get("warnings", [])],
        curves=base64.b64encode(plot.getvalue()).decode(),
    )
    write_file_atomically(out, page)
    say(console, f"report: {out}")
    return out


def figure_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, first value, last value) of each figure that the rows have."""
    return [
        (name, form.format(having[0][key]), form.format(having[-1][key]))
        for key, (name, form) in FIGURES.items()
        if (having := [row for row in rows if key in row])
    ]


def changed_settings(path: Path) -> list[tuple[str, Any]]:
    """Settings of a run that differ from the defaults; none if the file is missing.

    Raises:
        UserError: the file is not YAML with settings.
    """
    if not path.exists():
        return []
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected the settings of a run, found {type(settings).__name__}")
    defaults = vars(DPOConfig())
    return [(name, value) for name, value in settings.items() if value != defaults.get(name)]


def _without_prefix(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in row.items()}


def _step_of(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
