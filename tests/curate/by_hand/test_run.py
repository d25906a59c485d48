"""The whole command: stopped, killed, resumed and finished."""

import contextlib
import json
import signal
import subprocess
import sys

import pytest
from by_hand_pages import ROWS, ask, in_terminal
from rich.console import Console

from dpo_fast.config import LabelConfig, PairConfig
from dpo_fast.curate.by_hand.run import run_by_hand
from dpo_fast.curate.pair import pair_rows
from dpo_fast.curate.rows import write_rows
from dpo_fast.errors import UserError


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stop_look_resume_finish_and_pair(tmp_path, monkeypatch):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    text = in_terminal(monkeypatch, tmp_path, ["l", "u", "s", "q"], repeat_share=0)
    assert f"1 of 4 done, 1 skipped: {out}" in text
    assert "rerun the same command to resume" in text
    assert [row["scores"] for row in read(out)] == [[None] * 3] * 4
    in_terminal(monkeypatch, tmp_path, ["x", "", "R", "1"], repeat_share=0)  # and the input ends
    assert sum(row["scores"] != [None] * 3 for row in read(out)) == 2
    # The mode is no setting that the log belongs to; the last judgement of the earlier run is taken back first.
    text = in_terminal(monkeypatch, tmp_path, ["u", "t", "2", "u", "2", ""], repeat_share=0)
    assert "all is judged" in text
    assert f"4 of 4 done, 1 skipped: {out}" in text
    assert not partial.exists()
    rows = read(out)
    assert sorted(c["choice"] for row in rows for c in row["comparisons"]) == ["right", "right", "tie"]
    train, _, report = pair_rows(rows, PairConfig())
    assert (len(train), report.tied, report.unjudged) == (2, 1, 1)
    for row in train:
        comparison = rows[row["row"]]["comparisons"][0]
        assert row["chosen"] == rows[row["row"]]["responses"][comparison["right"]]
        assert row["rejected"] == rows[row["row"]]["responses"][comparison["left"]]
    with pytest.raises(UserError, match="exists already"):
        in_terminal(monkeypatch, tmp_path, [], repeat_share=0)


def test_a_result_that_someone_changed_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    in_terminal(monkeypatch, tmp_path, ["l"])
    out.write_text(mine := out.read_text() + "\n")
    with pytest.raises(UserError, match=r"was not written from .*partial"):
        in_terminal(monkeypatch, tmp_path, ["l"])
    assert out.read_text() == mine
    in_terminal(monkeypatch, tmp_path, ["l"], overwrite=True)
    assert sum(bool(row["comparisons"]) for row in read(out)) == 2


def test_an_interrupt_at_the_terminal_writes_the_result(tmp_path, monkeypatch):
    words = iter("lr")
    monkeypatch.setattr(Console, "input", lambda *_: next(words, None) or signal.raise_signal(signal.SIGTERM))
    text = in_terminal(monkeypatch, tmp_path, [])
    assert "2 of 4 done" in text
    assert sum(bool(row["comparisons"]) for row in read(tmp_path / "out.jsonl")) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_judged_leaves_nothing(tmp_path, monkeypatch):
    assert "nothing was judged" in in_terminal(monkeypatch, tmp_path, ["q"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_log_whose_judgements_are_all_damaged_is_kept(tmp_path, monkeypatch, caplog):
    in_terminal(monkeypatch, tmp_path, ["l", "r"])
    log = tmp_path / "out.jsonl.partial"
    log.write_bytes(damaged := log.read_bytes().replace(b"choice", b"bhoice"))
    (tmp_path / "out.jsonl").unlink()
    in_terminal(monkeypatch, tmp_path, ["q"])
    assert "damaged lines are set aside" in caplog.text
    assert log.read_bytes().startswith(damaged)
    text = in_terminal(monkeypatch, tmp_path, ["t"] * 5)
    assert "4 of 4 done" in text
    assert not log.exists()
    assert (tmp_path / "out.jsonl.partial.damaged").read_bytes().count(b"bhoice") == 2


def test_other_settings_do_not_resume(tmp_path, monkeypatch):
    in_terminal(monkeypatch, tmp_path, ["l"])
    for other in ({"seed": 1}, {"pairs": "all"}, {"repeat_share": 1.0}, {"max_rows": 3}):
        with pytest.raises(UserError, match=r"left by an interrupted run with other .*: rerun with those to resume it"):
            in_terminal(monkeypatch, tmp_path, ["l"], **other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat_share": 1.5}, "--repeat_share 1.5: expected a number in"),
        ({"out": ""}, "no output given"),
        ({"data": ""}, "no data given"),
        ({"port": 70000, "terminal": False}, "--port 70000: expected a number in"),
    ],
)
def test_mistakes_are_explained(tmp_path, monkeypatch, settings, message):
    with pytest.raises(UserError, match=message):
        in_terminal(monkeypatch, tmp_path, [], **settings)


def test_nothing_to_compare_is_a_mistake(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "responses": ["a", "a"]}, {"prompt": "p", "responses": ["a"]}])
    with pytest.raises(UserError, match="no row has two answers that differ"):
        in_terminal(monkeypatch, tmp_path, [])


PROGRAM = "import sys; from dpo_fast.curate.by_hand import run_by_hand; from dpo_fast.config import LabelConfig as C\n"
PROGRAM += "run_by_hand(C(data='rows.jsonl', out='out.jsonl', by_hand=True, repeat_share=0))"


@contextlib.contextmanager
def program(folder):
    """A running program and the address it printed."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield process, next(line.strip() for line in lines if line.startswith("http://127.0.0.1:"))
        finally:
            process.kill()


@pytest.mark.slow
def test_a_kill_loses_nothing_and_an_interrupt_writes_the_result(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with program(tmp_path) as (process, address):
        for place, choice in enumerate(("left", "tie", "skip")):
            assert ask(address, "judge", {"place": place, "choice": choice})[0] == 200
        state = ask(address, "undo", {"place": 3})[1]
        with pytest.raises(UserError, match=f"is in use by process {process.pid}"):
            run_by_hand(LabelConfig(data=str(tmp_path / "rows.jsonl"), out=str(out), terminal=True, repeat_share=0))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not out.exists()
    with program(tmp_path) as (process, address):
        again = ask(address, "state")[1]
        assert {**again, "seconds": 0} == {**state, "seconds": 0}
        assert (again["done"], again["place"]) == (2, 2)
        ask(address, "judge", {"place": 2, "choice": "right"})
        process.send_signal(signal.SIGINT)
        assert "3 of 4 done: out.jsonl" in process.stdout.read()
        assert process.wait(timeout=30) == 0
    choices = [c["choice"] for row in read(out) for c in row["comparisons"]]
    assert sorted(choices) == ["left", "right", "tie"]
    assert partial.exists()
    with program(tmp_path) as (process, address):
        ask(address, "judge", {"place": 3, "choice": "left"})
        process.send_signal(signal.SIGTERM)
        assert "4 of 4 done: out.jsonl" in process.stdout.read()
        assert process.wait(timeout=30) == 0
    assert not partial.exists()
    assert all(len(row["comparisons"]) == 1 for row in read(out))


@pytest.mark.parametrize(
    ("missing", "named"), [(("starlette", "uvicorn"), "starlette and uvicorn"), (("uvicorn",), "uvicorn")]
)
def test_without_its_extra_the_page_says_what_to_install(missing, named, monkeypatch, tmp_path):
    from dpo_fast.curate.by_hand import run

    monkeypatch.setattr(run, "find_spec", lambda name: None if name in missing else name)
    settings = {"data": str(tmp_path / "none.jsonl"), "out": str(tmp_path / "out.jsonl")}
    with pytest.raises(UserError, match=rf"needs {named} .*pip install 'dpo-fast\[by-hand\]'.*--terminal"):
        run.run_by_hand(LabelConfig(**settings, by_hand=True))
    with pytest.raises(UserError, match="no such file"):
        run.run_by_hand(LabelConfig(**settings, terminal=True))
