"""Outputs of every command: one process at a time, whole or absent, and one line when the disk is full."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from by_hand_pages import in_terminal
from full_disks import file_size_limit, full_disk, small_disk

from dpo_fast.cli import main
from dpo_fast.curate.rows import hold_output
from dpo_fast.curate.stopping import exit_on_signals
from dpo_fast.errors import UserError, WriteError

PROMPTS = [{"prompt": f"Numbers {number}"} for number in range(40)]
ANSWERS = [{"prompt": "p" * 50, "responses": ["a", "bb"], "votes": [1, 0], "scores": [n, 0]} for n in range(1, 41)]
PAIRS = [{"prompt": "Numbers", "chosen": f" {n}" * 50, "rejected": " fox" * 50} for n in range(40)]
STEPS = [{"step": step, "loss": 0.5} for step in range(1, 9)]
COMMANDS = {
    "sample": "--model {base} --data prompts.jsonl --out disk/out.jsonl --max_new_tokens 2 --device cpu --seed 1",
    "label": "--data answers.jsonl --out disk/out.jsonl --signals field:votes",
    "pair": "--data answers.jsonl --out disk/out.jsonl --eval_split 0.5 --eval_out disk/held_out.jsonl",
    "score": "--model {base} --data pairs.jsonl --out disk/out.jsonl --tokens --reference_store scores.sqlite",
    "eval": "--model {base} --reference {base} --prompts prompts.jsonl --signals field:prompt --out disk/out.json"
    " --temperature 0.5 --max_new_tokens 1 --num_samples 2",
    "inspect": "--model {base} --data pairs.jsonl --out disk/out.html --rows 0-20",
    "report": "--run disk",
}
FILES = {"pair": ["out.jsonl", "held_out.jsonl"], "eval": ["out.answers.jsonl"], "inspect": ["out.html"]}
FILES["report"] = ["report.html", "report.png"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("prompts", PROMPTS), ("answers", ANSWERS), ("pairs", PAIRS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_command(name, base):
    """Exit code and standard error, without the bar that transformers draws if it was imported before."""
    error = io.StringIO()
    # Standard output too: the file that pytest captures it in would run into the limit.
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main([name, *COMMANDS[name].format(base=base).split()])
    lines = error.getvalue().splitlines(keepends=True)
    return code, "".join(line for line in lines if "Loading weights" not in line and line.strip())


def outputs(name):
    return {file: (Path("disk") / file).read_bytes() for file in FILES.get(name, ["out.jsonl"])}


def clear(name):
    for path in Path("disk").iterdir():
        if path.name != "metrics.jsonl":
            path.unlink()


@pytest.mark.parametrize("name", ["sample", "label", "pair", "score", "eval"])
def test_a_second_process_is_refused_by_the_name_of_the_first(folder, base, name):
    out = Path("disk/out.json" if name == "eval" else "disk/out.jsonl")
    with hold_output(out):
        code, error = run_command(name, base)
    assert code == 2
    assert f"{out} is in use by process {os.getpid()} on " in error
    assert list(Path("disk").iterdir()) == []


def test_held_out_pairs_are_held_too(folder, base):
    with hold_output(Path("disk/held_out.jsonl")):
        assert "disk/held_out.jsonl is in use by process" in run_command("pair", base)[1]
    assert list(Path("disk").iterdir()) == []
    options = "pair --data answers.jsonl --out out.jsonl --eval_split 0.5 --eval_out ./out.jsonl"
    assert main(options.split()) == 2


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--out .*file/out\.jsonl: cannot be written to: File exists"),
        hold_output(tmp_path / "file" / "out.jsonl"),
    ):
        pass


@pytest.mark.parametrize("disk", ["limit", "tmpfs"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_the_same_command_finishes_later(folder, base, name, disk):
    place = small_disk(Path("disk")) if disk == "tmpfs" else contextlib.nullcontext(Path("disk").mkdir())
    with place:
        Path("disk/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS))
        assert run_command(name, base) == (0, "")
        expected = outputs(name)
        clear(name)
        limit = {"label": 1500, "sample": 1500}.get(name, 500)
        if disk == "tmpfs":
            shortage = full_disk(Path("disk"), 4096)
        else:
            # Below it the store could not be opened.
            shortage = file_size_limit(Path("disk"), 40_000 if name == "score" else limit)
        with shortage:
            code, error = run_command(name, base)
        reason = "No space left on device" if disk == "tmpfs" else "File too large"
        assert (code, error.count("\n")) == (1, 1)
        assert f"cannot be written: {reason}" in error
        left = {path.name for path in Path("disk").iterdir()}
        assert not left & {name for name in expected if name != "held_out.jsonl"}
        assert not [name for name in left if name.startswith(".")]
        code, error = run_command(name, base)
        if name == "pair" and "held_out.jsonl" in left:
            assert "held_out.jsonl exists already" in error
            Path("disk/held_out.jsonl").unlink()
            code, error = run_command(name, base)
        assert (code, error) == (0, "")
        assert outputs(name) == expected


@pytest.mark.parametrize("kept", [0, 8192])
def test_scratch_folders_without_room_end_the_run_and_mark_no_answer(folder, monkeypatch, kept):
    """Without a page there is no worker, with two of them there is no room for what its program reads."""
    Path("answers.jsonl").write_text(json.dumps({"responses": ["a" * 10_000, "b"]}) + "\n")
    command = ["label", "--data", "answers.jsonl", "--out", "out.jsonl", "--allow_commands", "--num_workers", "1"]
    command += ["--signals", f"command:{sys.executable} -S -c 1"]
    error = io.StringIO()
    with small_disk(folder / "scratch"), contextlib.redirect_stderr(error):
        monkeypatch.setenv("TMPDIR", str(folder / "scratch"))
        # As if it had been full only after Python chose it.
        monkeypatch.setattr("tempfile.tempdir", str(folder / "scratch"))
        with full_disk(folder / "scratch", kept):
            assert main(command) == 1
        assert "scratch" in error.getvalue()
        assert "cannot be written: No space left on device" in error.getvalue()
        assert error.getvalue().endswith("TMPDIR names it; rerun the same command to resume\n")
        assert list((folder / "scratch").iterdir()) == []
        assert main(command) == 0
    assert json.loads(Path("out.jsonl").read_text())["scores"] == [1, 1]


def test_a_person_keeps_all_judgements_when_the_disk_is_full(tmp_path, monkeypatch):
    with file_size_limit(tmp_path, 600), pytest.raises(WriteError, match="cannot be written: File too large"):
        in_terminal(monkeypatch, tmp_path, ["l"] * 9 + ["q"])
    assert not (tmp_path / "out.jsonl").exists()
    text = in_terminal(monkeypatch, tmp_path, ["q"])
    assert "of 4 done" in text
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(bool(row["comparisons"]) for row in rows) >= 2


def test_a_result_that_was_not_written_is_replaced_later(tmp_path, monkeypatch):
    """Killed between the note in the log and the result, or after both."""
    in_terminal(monkeypatch, tmp_path, ["l"])
    with monkeypatch.context() as patch:
        patch.setattr(
            "dpo_fast.curate.by_hand.run.write_file_atomically", lambda *_: signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            in_terminal(monkeypatch, tmp_path, ["r"])
    assert "3 of 4 done" in in_terminal(monkeypatch, tmp_path, ["t"])


@pytest.mark.parametrize(
    ("number", "resumable", "code"),
    [
        *((signal.SIGTERM, True, 75), (signal.SIGHUP, True, 75)),
        *((signal.SIGTERM, False, 143), (signal.SIGHUP, False, 129)),
    ],
)
def test_a_signal_cleans_up_and_exits(capsys, number, resumable, code):
    cleaned = []

    @exit_on_signals(resumable=resumable)
    def work():
        try:
            with contextlib.suppress(Exception, SystemExit):
                signal.raise_signal(number)
            cleaned.append("not at all")
        finally:
            signal.raise_signal(signal.SIGTERM)  # is ignored: cleaning up has begun
            cleaned.append("up")

    with pytest.raises(SystemExit) as end:
        work()
    assert (end.value.code, cleaned) == (code, ["up"])
    cure = "; rerun the same command to resume" if resumable else ""
    assert capsys.readouterr().err == f"stopped by {number.name}{cure}\n"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals(resumable=True):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sample", "dpo_fast.curate.sample.without_duplicates"),
        ("score", "dpo_fast.analysis.score.pair_records"),
        ("eval", "dpo_fast.analysis.evaluate._side_by_side"),
    ],
)
def test_commands_with_a_model_stop_at_once(folder, base, monkeypatch, name, place):
    """The signal arrives in the middle of the work."""
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            run_command(name, base)
    assert end.value.code == (75 if name == "sample" else 143)
    assert [path.name for path in Path("disk").iterdir()] == ["out.jsonl.partial"] * (name == "sample")
    assert run_command(name, base) == (0, "")


SLOW = """
import os, subprocess, sys, time

def judge(answer, row):
    if answer == "slow":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open("is_slow", "a").close()
        while not os.path.exists("go"):
            try: time.sleep(600)
            except BaseException: pass
    return 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_label_leaves_a_log_and_no_process(tmp_path, number, code):
    """The checker ignores interrupts, and has started a process that left its group."""
    (tmp_path / "own_slow.py").write_text(SLOW)
    rows = [{"responses": ["fast"]}] * 20 + [{"responses": ["slow"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-m", "dpo_fast.cli", "label", "--data", "rows.jsonl", "--out", "out.jsonl"]
    command += ["--num_workers", "1", "--timeout", "500", "--signals", '["field:none", "python:own_slow:judge"]']
    settings = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    settings["env"] = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen(command, **settings) as process:
        while not (tmp_path / "is_slow").exists():
            assert process.poll() is None
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 2
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert "Traceback" not in process.stderr.read()
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "go").touch()
    done = subprocess.run(command, **settings, check=True)
    assert done.stderr == ""
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 21
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]
