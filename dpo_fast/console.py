"""What a run shows in the terminal: a live line where there is one, plain lines where output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# What acts on a terminal: control characters (C1 included, since some obey it) and the two that reorder letters.
_ACTIVE = {*map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x202D, 0x202E])} - {"\n", "\t"}


def visible(text: str, *, strict: bool = False) -> str:
    """The text with control characters as readable escapes such as `\\x1b`; newlines and tabs stay.

    Unicode's pictures of control characters would be shorter, but many fonts lack them.

    Args:
        text: any text.
        strict: also escape all else that does not show, such as joiners, no-break spaces and carriage returns before a
            newline. It takes emoji and scripts apart, so it suits a view of tokens, not of texts to read.
    """
    if strict:
        return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)
    return "".join(_escape(c) if c in _ACTIVE else c for c in text.replace("\r\n", "\n"))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Print a line as it is: names, answers and reasons are full of brackets, which rich would read as markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def format_metrics(metrics: dict[str, float]) -> str:
    """`loss 0.6931  accuracy 0.50 (all ties)  margin +0.0000  412 tokens/s`, from the names of `metrics.jsonl`.

    A tie counts half here and in `dpo-fast eval`; `rewards/accuracies` alone leaves ties out, as TRL's does.
    """
    if not metrics:
        return ""
    prefix = "eval_" if "eval_loss" in metrics else ""
    ties = metrics.get(prefix + "rewards/ties", 0.0)
    note = "" if ties == 0 else " (all ties)" if ties == 1 else f" ({ties:.0%} ties)"
    parts = [
        f"{prefix}loss {metrics[prefix + 'loss']:.4f}",
        f"accuracy {metrics[prefix + 'rewards/accuracies'] + ties / 2:.2f}{note}",
        f"margin {metrics[prefix + 'rewards/margins']:+.4f}",
    ]
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)


# Between two lines of progress where there is no terminal.
LINE_SECONDS = 10.0


class ProgressLine:
    """One task's bar; see `progress_line`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.task_ids[0]
        self._said = time.monotonic()

    def start(self, total: int) -> None:
        """Set the number of items, where it was not known before."""
        self._progress.update(self._task, total=total)

    def advance(self, amount: int = 1) -> None:
        """Move on by `amount`; without a terminal, a line every `LINE_SECONDS` shows that there is progress."""
        self._progress.advance(self._task, amount)
        console, now = self._progress.console, time.monotonic()
        if not console.is_terminal and now - self._said >= LINE_SECONDS:
            self._said = now
            task = self._progress.tasks[0]
            total = "" if task.total is None else f" of {task.total:g}"
            say(console, f"{task.description}: {task.completed:g}{total}")

    def report(self, label: str, metrics: dict[str, float]) -> None:
        """Show figures next to the bar, or print them as a line if there is no terminal."""
        text = format_metrics(metrics)
        self._progress.update(self._task, figures=text)
        if not self._progress.console.is_terminal:
            say(self._progress.console, f"{label}  {text}")


@contextmanager
def progress_line(console: Console, description: str, total: int, completed: int = 0) -> Iterator[ProgressLine]:
    """A bar of `total` items with the time left, drawn only on a terminal."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    progress.add_task(description, total=total, completed=completed, figures="")
    # Entered on a terminal alone: rich 14.0 ends even a disabled bar by an empty line in a file.
    with progress if console.is_terminal else nullcontext():
        yield ProgressLine(progress)
