"""Workers that hang, crash or cannot start: no other row loses its scores, and nothing is left behind."""

import os
import subprocess
import sys
import tempfile
import textwrap

import psutil
import pytest
from judging import judge, scores

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.curate.workers import handle
from dpo_fast.curate.workers.pool import judge_texts

pytestmark = pytest.mark.slow


def test_what_does_not_come_back_is_killed(own, monkeypatch):
    monkeypatch.setattr(handle, "KILL_GRACE", 0.5)
    [verdicts] = judge([own], ["good", "stuck", "deaf", "good"], timeout=0.3)
    killed = (None, "took longer than 0.3 s and was killed")
    assert verdicts == [(1.0, None), killed, killed, (1.0, None)]


def test_a_crash_costs_no_other_row_its_scores(own):
    config = SignalConfig(signals=[own, "json"], num_workers=2)
    questions = {n: Question({}, "", ["a", "crash" if n % 10 == 3 else "[]"]) for n in range(40)}
    found = dict(judge_texts(questions, parse_signals(config), config))
    assert sorted(found) == list(range(40))
    for number, [of_own, of_json] in found.items():
        crashed = number % 10 == 3
        assert [v.score for v in of_own] == [1, None if crashed else 1]
        assert [v.score for v in of_json] == [0, 0 if crashed else 1]


class _Poison:
    """A value that kills who reads it."""

    def __reduce__(self):
        return os._exit, (5,)


def test_a_row_that_cannot_even_be_read_is_marked_alone(monkeypatch):
    config = SignalConfig(signals=["json", "length:1-"], num_workers=1)
    questions = {n: Question({"x": _Poison() if n in (2, 5) else 0}, "", ["[]", ""]) for n in range(8)}
    found = dict(judge_texts(questions, parse_signals(config), config))
    reason = "ended the process that judged it (exit code 5)"
    for number, verdicts in found.items():
        poisoned = [[(None, reason)] * 2] * 2
        assert verdicts == (poisoned if number in (2, 5) else [[(1.0, None), (0.0, None)]] * 2)


def test_workers_that_cannot_start_end_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(handle, "_START", "raise SystemExit(9)")
    with pytest.raises(RuntimeError, match="exit code 9"):
        judge(["json"], ["[]"])
    assert list(tmp_path.iterdir()) == []


def test_memory_that_an_answer_takes_is_limited():
    # Python needs some 600 bytes for each of these, a list that JSON spends two characters on needs 64.
    answers = ["f(x)\n" * 2_000_000, "x = 1"]
    assert scores("compiles:python", answers, memory_limit_mib=256) == [0, 1]


def test_a_script_without_a_main_guard_can_judge(tmp_path):
    script = """
        print("once")
        from rich.console import Console
        from dpo_fast.curate.label import label_rows
        from dpo_fast.config import LabelConfig
        rows = [{"responses": ["[]", "x"]}] * 3
        found = label_rows(rows, LabelConfig(signals="json", num_workers=2), console=Console(quiet=True))
        print([row["scores"] for row in found])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert done.stdout == f"once\n{[[1.0, 0.0]] * 3}\n"


def test_workers_do_not_import_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_modules.py").write_text("import sys\ndef judge(answer, row): return answer in sys.modules\n")
    assert scores("python:own_modules:judge", ["torch", "transformers", "regex"]) == [0, 0, 1]


def test_no_process_and_no_file_is_left(own, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    judge([own], ["good", "crash", "sleep"], timeout=0.3, num_workers=2)
    assert list(scratch.iterdir()) == []
    assert [p for p in psutil.Process().children() if "workers.worker" in " ".join(p.cmdline())] == []
