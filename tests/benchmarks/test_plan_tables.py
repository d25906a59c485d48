"""The tables of docs/plan.md."""

from pathlib import Path

import pytest

from dpo_fast.planning.shapes import NAMED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_tables

    return plan_tables


def tables(script):
    return script.DOCS.read_text().partition(script.BEGIN)[2].partition(script.END)[0]


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "llama-3-8b", "llama-3.1-405b"])
def test_docs_have_what_the_plan_says(script, model):
    one_card = tables(script).partition("8 cards**")[0]
    row = next(line for line in one_card.splitlines() if line.startswith(f"| {model} |"))
    assert row.split(" | ")[2] == script.cell(model, "full", "h100-80", 1)


def test_all_that_train_cannot_run_is_marked(script):
    found = tables(script)
    assert found.count("`train` runs these") == 1
    assert found.count("`train` cannot run these yet") == 2 * len(script.NAMES) - 1
    assert found.count("(measured)") == 1
    assert all(found.count(f"| {model} |") == 2 * len(script.NAMES) for model in NAMED)
