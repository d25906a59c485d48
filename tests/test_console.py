"""The one line that a run shows: figures and the time left on a terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from dpo_fast.console import format_metrics, progress_line, visible

FIGURES = {"loss": 0.69314, "rewards/accuracies": 0.5, "rewards/margins": 0.00012, "tokens_per_second": 412.4}


def test_figures_are_trls_by_short_names():
    assert format_metrics(FIGURES) == "loss 0.6931  accuracy 0.50  margin +0.0001  412 tokens/s"
    held_out = {f"eval_{name}": value for name, value in FIGURES.items() if name != "tokens_per_second"}
    assert format_metrics(held_out) == "eval_loss 0.6931  accuracy 0.50  margin +0.0001"
    assert format_metrics({}) == ""


@pytest.mark.parametrize(
    ("strict", "ties", "shown"), [(0.0, 1.0, "0.50 (all ties)"), (0.6, 0.25, "0.72 (25% ties)"), (0.6, 0.0, "0.60 ")]
)
def test_a_tie_counts_half(strict, ties, shown):
    assert f"accuracy {shown}" in format_metrics(FIGURES | {"rewards/accuracies": strict, "rewards/ties": ties})


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_has_a_bar_and_a_file_has_lines(is_terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=140)
    with progress_line(console, "training", 30, completed=10) as line:
        line.advance(20)
        line.report("step 30/30", FIGURES)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    if is_terminal:
        shown = text.strip().split("\n")[-1]
        assert re.search(r"training .* 30/30 loss 0\.6931 .* 412 tokens/s \d:\d\d:\d\d left \d:\d\d:\d\d", shown)
    else:
        assert text == "step 30/30  loss 0.6931  accuracy 0.50  margin +0.0001  412 tokens/s\n"


def test_control_characters_become_escapes_and_nothing_else_changes():
    assert visible("a\tb\r\nc\rd\x00\x1b[2J\x7f\x9b1m\u202e") == "a\tb\nc" + r"\x0dd\x00\x1b[2J\x7f\x9b1m\u202e"
    harmless = "<b>שלום</b> مرحبا 👩‍🚀 \u200f \u00a0 ␛"
    assert visible(harmless) == harmless


def test_strictly_all_that_does_not_show_becomes_an_escape():
    assert visible("a\tb\r\n\x1b\u202e", strict=True) == "a\tb" + r"\x0d" + "\n" + r"\x1b\u202e"
    assert visible("👩‍🚀\u200f\u00a0\ud800\U000e0001", strict=True) == r"👩\u200d🚀\u200f\xa0\ud800\ue0001"
    readable = "<b>שלום</b> 日本語 naïve ␛"
    assert visible(readable, strict=True) == readable


def test_without_a_terminal_there_is_a_line_every_ten_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dpo_fast.console.time.monotonic", lambda: now[0])
    output = io.StringIO()
    with progress_line(Console(file=output, width=80), "reference", 30) as line:
        for _ in range(25):
            now[0] += 1
            line.advance()
    assert output.getvalue().splitlines() == ["reference: 10 of 30", "reference: 20 of 30"]
