"""What a run says while it trains: `metrics.jsonl`, the progress line, warnings, the kernels that were chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_fast.console import ProgressLine, progress_line, say
from dpo_fast.files import write_file_atomically
from dpo_fast.kernels import autotune
from dpo_fast.training.metrics import DAMAGED_METRICS_FILE, METRICS_FILE, MetricsFile, peak_memory_gib
from dpo_fast.training.plan import Plan
from dpo_fast.training.run_folder import CHOICES_FILE
from dpo_fast.training.warning_signs import WarningSigns


class KernelChoices:
    """Which kernels were chosen on this GPU, and how long each took, in a file of the run's folder."""

    def __init__(self, folder: Path) -> None:
        """Start from what an earlier part of the run wrote; a file that cannot be read is set aside."""
        self._path = folder / CHOICES_FILE
        self._written = read_choices(folder)
        if not self._written and self._path.exists():
            self._path.replace(self._path.with_name(f"{CHOICES_FILE}.damaged"))

    def write(self) -> None:
        """Write the file if a choice is new."""
        choices = self._written | autotune.choices()
        if choices != self._written:
            write_file_atomically(self._path, json.dumps(choices, indent=1) + "\n")
        self._written = choices


def read_choices(folder: Path) -> dict[str, Any]:
    """The choices in a run's folder; none if there is no file that can be read."""
    try:
        found = json.loads((folder / CHOICES_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Reporter:
    """Writes and shows rows of metrics; see `open_reporter`."""

    def __init__(
        self,
        folder: Path,
        metrics: MetricsFile,
        line: ProgressLine,
        signs: WarningSigns,
        console: Console,
        plan: Plan,
    ) -> None:
        self._metrics = metrics
        self._line = line
        self._signs = signs
        self._console = console
        self._plan = plan
        self._choices = KernelChoices(folder)

    def advance(self) -> None:
        """Count an optimizer step."""
        self._line.advance()

    def training(self, step: int, row: dict[str, Any]) -> None:
        """Write a row of training figures with what it warns of."""
        warnings = self._signs.observe(row)
        self.write(step, row | {"warnings": warnings} if warnings else row)
        for text in warnings:
            say(self._console, f"warning (step {step}): {text}", style="yellow")

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Write a row and show it."""
        place = {"epoch": step / self._plan.steps_per_epoch, "step": step}
        self._metrics.write(row | {"peak_memory_gib": peak_memory_gib(self._plan.placement.device)} | place)
        self._choices.write()
        self._line.report(f"step {step}/{self._plan.num_steps}", row)


class SilentReporter:
    """In place of `Reporter` in processes that write nothing."""

    def advance(self) -> None:
        """As `Reporter.advance`."""

    def training(self, step: int, row: dict[str, Any]) -> None:
        """As `Reporter.training`."""

    def write(self, step: int, row: dict[str, Any]) -> None:
        """As `Reporter.write`."""


@contextmanager
def open_reporter(
    folder: Path, signs: WarningSigns, console: Console, plan: Plan, *, step: int
) -> Iterator[Reporter | SilentReporter]:
    """A reporter of a run that has done `step` steps; rows of later steps, left by a run that died, are dropped."""
    if not plan.ranks.is_writer:
        yield SilentReporter()
        return
    with (
        MetricsFile(folder / METRICS_FILE, keep_up_to_step=step) as metrics,
        progress_line(console, "training", plan.num_steps, step) as line,
    ):
        if metrics.num_damaged:
            say(
                console, f"{METRICS_FILE}: {metrics.num_damaged} damaged lines were set aside in {DAMAGED_METRICS_FILE}"
            )
        for row in metrics.kept:
            signs.observe(row)
        yield Reporter(folder, metrics, line, signs, console, plan)
