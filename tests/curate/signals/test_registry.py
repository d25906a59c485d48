"""Signals by name: mistakes, help, docs, and a signal added in one file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_fast.cli import main
from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.declare import KILL_GRACE, SIGNALS, Limits
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
USAGES = [usage for declaration in SIGNALS.values() for usage in declaration.usages]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "no signals given.*compiles:python.*judge:NAME"),
        ("jsonn", "--signals jsonn: unknown; choose from command:PROGRAM"),
        (["json", "json"], "named twice"),
        ("compiles:rust", "expected compiles:python"),
        ("json:string", "expected json, json:object or json:array"),
        ("json_schema", "expected json_schema:FILE"),
        ("json_schema:no-such-file.json", "cannot read the schema: No such file"),
        ("regex", "expected regex:PATTERN"),
        ("regex:(", "not a regular expression"),
        ("number", "expected number:COLUMN"),
        ("number:gold:cubed", "expected number:COLUMN or number:COLUMN:squared"),
        ("exact", "expected exact:COLUMN"),
        ("contains:", "expected contains:COLUMN"),
        ("length:5", "expected length:MIN-MAX"),
        ("length:9-3", "the smaller number first"),
        ("length:-", "expected length:MIN-MAX"),
        ("field", "expected field:COLUMN"),
        ("python:", "expected python:module:function"),
        ("python:no_such_module:f", "cannot be imported"),
        ("python:json:nothing", "cannot be imported"),
        ("python:math:pi", "expected a function, found float"),
        ("reward-model", "expected reward-model:NAME"),
        ("judge:", "expected judge:NAME"),
    ],
)
def test_a_signal_that_is_written_wrongly_is_explained(spec, message):
    with pytest.raises(UserError, match=message):
        parse_signals(SignalConfig(signals=spec))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_weights_must_fit(weights):
    with pytest.raises(UserError, match="expected 2 numbers, one for each"):
        parse_signals(SignalConfig(signals=["json", "length:1-2"], signal_weights=weights))


def test_the_docs_list_every_signal():
    table = (ROOT / "docs" / "signals.md").read_text().partition("## All signals")[2].partition("\n## ")[0]
    first_columns = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(usage for cell in first_columns for usage in cell.split("`")[1::2]) == sorted(USAGES)


def test_the_help_names_every_signal(capsys):
    with pytest.raises(SystemExit) as end:
        main(["label", "--help"])
    assert end.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    assert [usage for usage in USAGES if usage.replace(" ", "") not in text] == []


def test_a_limit_beyond_the_kill_is_refused():
    with pytest.raises(AssertionError, match="the process is killed first"):
        Limits(timeout_grace=KILL_GRACE)


INVENTED = """
import time
from pathlib import Path

from dpo_fast.curate.identity import file_identity
from dpo_fast.curate.signals.declare import Limits, bad_spec, text_signal


@text_signal("vowels", "vowels:FILE", limits=Limits(timeout_grace=1.0), identity=file_identity)
def vowels(argument, config):
    if not argument:
        raise bad_spec("vowels", "vowels:FILE")
    letters = Path(argument).read_text()

    def judge(answer, row):
        if answer == "slow":
            time.sleep(config.timeout + 0.1)  # within its grace
        return sum(letter in letters for letter in answer)

    return judge
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one more file of code, and a way to run its command."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "dpo_fast", folder / "dpo_fast", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dpo_fast" / "curate" / "signals" / "invented.py").write_text(INVENTED)
    (folder / "letters").write_text("aeiou")
    (folder / "rows.jsonl").write_text(json.dumps({"responses": ["a house", "xyz", "slow"]}) + "\n")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dpo_fast.cli", "label", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "500"},
            capture_output=True,
            text=True,
        )

    return folder, run


@pytest.mark.slow
def test_a_new_signal_takes_one_file_of_code(copy):
    folder, run = copy
    command = ["--data", "rows.jsonl", "--out", "out.jsonl", "--signals", "vowels:letters", "--timeout", "0.5"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    [row] = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert row["scores"] == [4, 0, 1]
    assert "vowels:FILE" in run("--help").stdout
    wrong = run("--data", "rows.jsonl", "--out", "b.jsonl", "--signals", "vowel")
    assert "--signals vowel: unknown; choose from command:PROGRAM" in wrong.stderr
    assert "vowels, vowels:FILE" in wrong.stderr
