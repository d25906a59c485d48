"""`dpo-fast label` and `label()`: rows in, scored rows out, whatever happens in between."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import datasets
import psutil
import pytest
from oracle import save_tiny_checkpoint
from rich.console import Console

from dpo_fast.cli import main
from dpo_fast.config import EvalConfig, LabelConfig
from dpo_fast.curate import judge_rows
from dpo_fast.curate import label as label_module
from dpo_fast.curate.label import label, label_rows
from dpo_fast.errors import UserError

ROWS = [
    {"prompt": "Add 2 and 3", "responses": ["5", "[6]", "five"], "gold": 5, "id": "a"},
    {
        "prompt": [{"role": "user", "content": "Add 1 and 1"}],
        "responses": [[{"role": "assistant", "content": "2"}], "3"],
    },
    {"prompt": "none", "responses": []},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    yield tmp_path
    for name in ("slow_signal", "counted_signal", "own_signal", "own_words"):
        sys.modules.pop(name, None)


def console():
    return Console(file=io.StringIO(), width=80)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_weighted_sums(folder, capsys):
    command = ["label", "--data", "rows.jsonl", "--out", "out.jsonl", "--signals", '["json", "number:gold"]']
    assert main([*command, "--signal_weights", "[10, 0.5]"]) == 0
    first, second, third = read(folder / "out.jsonl")
    assert first == ROWS[0] | {
        "scores": [10.0, 9.5, -1.0],
        "signals": {"json": [1.0, 1.0, 0.0], "number:gold": [0.0, -1.0, -2.0]},
        "signal_errors": {"number:gold": {"2": "no number in the answer"}},
    }
    missing = "the row has no 'gold'"
    assert second == ROWS[1] | {
        "scores": [None, None],
        "signals": {"json": [1.0, 1.0], "number:gold": [None, None]},
        "signal_errors": {"number:gold": {"0": missing, "1": missing}},
    }
    assert third == ROWS[2] | {"scores": [], "signals": {"json": [], "number:gold": []}}
    out = capsys.readouterr().out
    assert "json: mean 0.8, 5 answers scored\n" in out
    assert "number:gold: mean -1, 3 answers scored, 2 failed (row 1, answer 0: the row has no 'gold')\n" in out
    assert "out.jsonl: 3 rows" in out
    assert not (folder / "out.jsonl.partial").exists()


def test_one_signal_needs_no_list_and_may_look_like_yaml(folder):
    for number, spec in enumerate([r"regex:^\[\d+\]$", "length:1-1", "regex:a: b", "python:math:nothing"]):
        code = main(["label", "--data", "rows.jsonl", "--out", f"{number}.jsonl", "--signals", spec])
        assert code == (2 if spec.startswith("python") else 0)
    assert read(folder / "0.jsonl")[0]["scores"] == [0, 1, 0]
    assert read(folder / "1.jsonl")[0]["scores"] == [1, 0, 0]


def test_a_bad_row_does_not_end_the_run(folder):
    rows = [
        {"prompt": "x", "responses": ["1"]},
        {"prompt": "x"},
        {"prompt": "x", "responses": "1"},
        {"prompt": "x", "responses": [3]},
        {"prompt": "x", "responses": [["1"]]},
        {"prompt": None, "responses": ["a", "2"]},
    ]
    out = console()
    labelled = label_rows(rows, LabelConfig(signals="json"), console=out)
    assert [(row["prompt"], row["scores"]) for row in labelled] == [("x", [1]), (None, [0, 1])]
    said = out.file.getvalue()
    assert said.startswith("4 rows dropped (row 1: field 'responses': expected a list of answers")
    with pytest.raises(UserError, match=r"no row has answers: row 0: an answer is neither"):
        label_rows(rows[4:5], LabelConfig(signals="json"), console=out)


def test_label_again_by_the_scores_of_before():
    rows = [{"responses": ["1", "x"], "scores": [3.0, 4.0], "signal_errors": {"old": {"0": "gone"}}}]
    config = LabelConfig(signals=["field:scores", "json"], signal_weights=[1, 100])
    [row] = label_rows(rows, config, console=console())
    assert row["scores"] == [103, 4]
    assert row["signal_errors"] == {}
    assert rows[0]["scores"] == [3.0, 4.0]


def test_the_sum_stays_a_number_that_json_can_hold():
    rows = [{"responses": ["1"], "big": [1e308]}]
    [row] = label_rows(rows, LabelConfig(signals="field:big", signal_weights=[1e300]), console=console())
    assert row["scores"] == [sys.float_info.max]


def test_label_takes_and_gives_a_dataset(folder):
    data = datasets.Dataset.from_list([{"prompt": "p", "responses": ["[]", "x"], "gold": 1}] * 3)
    out = console()
    found = label(data, signals=["json", "length:1-1"], console=out, num_workers=1)
    assert isinstance(found, datasets.Dataset)
    assert found["scores"] == [[1.0, 1.0]] * 3
    assert found[0]["signals"] == {"json": [1.0, 0.0], "length:1-1": [0.0, 1.0]}
    assert found["gold"] == [1] * 3
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, [ROWS[0], {"responses": ["1"]}, ROWS[0]])))
    marked = label("texts.jsonl", signals="number:gold", console=out, max_rows=2)
    assert marked["scores"] == [[0.0, -1.0, -2.0], [None]]
    assert marked["signal_errors"][0]["number:gold"]["2"] == "no number in the answer"


def test_unknown_settings_are_named():
    with pytest.raises(UserError, match="unknown setting 'timeoutt'; choose from allow_commands"):
        label([], signals="json", timeoutt=3)
    with pytest.raises(UserError, match="no row has answers: there are no rows"):
        label([], signals="json")


def test_evals_settings_will_do():
    [row] = label_rows([{"responses": ["1"]}], EvalConfig(signals="json"), console=console())
    assert row["scores"] == [1]


def test_a_model_beside_signals_of_text(folder):
    save_tiny_checkpoint(folder / "model")
    rows = [{"prompt": "p", "responses": ["same", "same"]}, {"prompt": "p", "responses": ["1"]}]
    config = LabelConfig(signals=["json", "judge:model"], device="cpu")
    both, alone = label_rows(rows, config, console=console())
    assert both["scores"] == [0.5, 0.5]
    assert alone["scores"] == [None]
    assert alone["signal_errors"] == {"judge:model": {"0": "a judge needs two answers to compare"}}
    assert list(both["signals"]) == ["json", "judge:model"]


def test_hostile_text_goes_through(folder):
    answers = ["\ud800", "<script>alert(1)</script>", "\0\x1b[31m", "\u202eabc", "a" * 100_000, "\n\u2028"]
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "p", "responses": answers}) + "\n")
    assert main(["label", "--data", "rows.jsonl", "--out", "o.jsonl", "--signals", "length:0-9"]) == 0
    [row] = read(folder / "o.jsonl")
    assert row["responses"] == answers
    assert row["scores"] == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no signals given: pass --signals with one or a list of command:PROGRAM"),
        ("--signals command:true", "allow it with --allow_commands true"),
        ("--signals json --out o.txt", "expected a file that ends in .jsonl"),
        ("--signals json --data none.jsonl", "no such file"),
        ("--signals json --responses_column answers", "no row has answers: row 0: field 'answers'"),
        ("--signals json --out rows.jsonl", "exists already"),
    ],
)
def test_mistakes_give_one_clear_message(folder, capsys, options, message):
    command = "label --data rows.jsonl --out out.jsonl " + options
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "out.jsonl").exists()


COUNTED = """
import os, time

def judge(answer, row):
    with open("calls", "a") as calls:
        calls.write(f"{row['id']} {answer}\\n")
    time.sleep(float(os.environ.get("SLEEP", 0)))
    return len(answer)
"""


@pytest.mark.slow
def test_a_killed_run_resumes(folder):
    (folder / "counted_signal.py").write_text(COUNTED)
    (folder / "checker.py").write_text("import time\ntime.sleep(0.02)\nprint(2)\n")
    rows = [{"id": n, "responses": ["a" * n, f"{n}"]} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    specs = ["python:counted_signal:judge", f"command:{sys.executable} -S checker.py"]
    command = [sys.executable, "-m", "dpo_fast.cli", "label", "--data", "rows.jsonl", "--out", "out.jsonl"]
    command += ["--signals", json.dumps(specs), "--allow_commands", "--num_workers", "2"]
    environment = os.environ | {"SLEEP": "0.05", "TMPDIR": str(scratch)}
    run = subprocess.Popen(command, env=environment)
    log = folder / "out.jsonl.partial"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert run.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert workers
    run.send_signal(signal.SIGKILL)
    run.wait()
    # The orphans end by themselves, with all that they started, and clear up.
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert list(scratch.iterdir()) == []

    logged = [record for record in map(json.loads, log.read_text().splitlines()) if "key" in record]
    assert 0 < len(logged) < 60
    calls = folder / "calls"
    calls.unlink()
    subprocess.run(command, env=os.environ | {"TMPDIR": str(scratch)}, check=True)
    assert len(calls.read_text().splitlines()) == 2 * (60 - len(logged))
    found = read(folder / "out.jsonl")
    assert [row["scores"] for row in found] == [[n + 2.0, len(str(n)) + 2.0] for n in range(60)]
    assert not log.exists()
    assert list(scratch.iterdir()) == []


def interrupt(monkeypatch, *options):
    """A run that is done with judging and dies as it writes."""

    def full(*_):
        raise OSError("disk full")

    command = ["label", "--data", "rows.jsonl", "--out", "out.jsonl", *options]
    with monkeypatch.context() as patch:
        patch.setattr(label_module, "write_rows", full)
        with pytest.raises(OSError, match="disk full"):
            main(command)
    return command


def test_what_is_in_the_log_is_not_judged_again(folder, monkeypatch):
    save_tiny_checkpoint(folder / "model")
    specs = '["json", "number:gold", "judge:model", "field:responses"]'
    command = interrupt(monkeypatch, "--signals", specs, "--device", "cpu")
    monkeypatch.setattr(judge_rows, "judge_texts", lambda questions, *_: (row for row in dict(questions)))
    monkeypatch.setattr("dpo_fast.model.load.load_model", None)
    assert main([*command, "--num_workers", "7", "--signal_weights", "[1, 2, 0, 0]"]) == 0
    first, *_ = read(folder / "out.jsonl")
    assert first["signals"]["number:gold"] == [0, -1, -2]
    assert first["signal_errors"]["number:gold"] == {"2": "no number in the answer"}


@pytest.mark.parametrize(
    ("change", "named"),
    [("rows", "rows"), ("timeout", "settings"), ("schema", "files of the signal json_schema:schema.json")],
)
def test_a_log_of_something_else_is_refused(folder, monkeypatch, capsys, change, named):
    schema = folder / "schema.json"
    schema.write_text("true")
    command = interrupt(monkeypatch, "--signals", "json_schema:schema.json")
    if change == "rows":
        (folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    elif change == "schema":
        schema.write_text("false")
    else:
        command += ["--timeout", "3"]
    assert main(command) == 2
    assert f"left by an interrupted run with other {named}: rerun with those to resume it" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    [first, *_] = read(folder / "out.jsonl")
    assert first["scores"] == ([0, 0, 0] if change == "schema" else [1, 1, 0])


OWN_SIGNAL = "import own_words\n\ndef judge(answer, row):\n    return own_words.score(answer)\n"


FUNCTION, COMMAND, JUDGE = "python:own_signal:judge", f"command:{sys.executable} -S checker.py", "judge:model"


@pytest.mark.parametrize(
    ("signal", "changed"),
    [
        (FUNCTION, "own_signal.py"),
        (FUNCTION, "own_words.py"),
        (COMMAND, "checker.py"),
        (JUDGE, "model/model.safetensors"),
        (JUDGE, "versions"),
    ],
)
def test_results_of_a_changed_checker_or_model_are_not_mixed(folder, monkeypatch, capsys, signal, changed):
    save_tiny_checkpoint(folder / "model")
    (folder / "own_signal.py").write_text(OWN_SIGNAL)
    (folder / "own_words.py").write_text("score = len\n")
    (folder / "checker.py").write_text("print(2)\n")
    command = interrupt(monkeypatch, "--signals", signal, "--allow_commands", "--device", "cpu")
    if changed == "versions":
        monkeypatch.setattr("dpo_fast.curate.identity.version", lambda package: "1.0")
    else:
        (folder / changed).write_bytes((folder / changed).read_bytes() + b"\n")
    capsys.readouterr()
    assert main(command) == 2
    named = "versions" if changed == "versions" else f"files of the signal {signal}"
    assert f"left by an interrupted run with other {named}: rerun with those to resume it" in capsys.readouterr().err


def test_people_judge_by_another_module(monkeypatch):
    seen = []
    module = type(sys)("dpo_fast.curate.by_hand")
    module.run_by_hand = lambda config, console: seen.append(config)
    monkeypatch.setitem(sys.modules, "dpo_fast.curate.by_hand", module)
    for option in ("--by-hand", "--terminal"):
        assert main(["label", "--data", "x.jsonl", "--out", "y.jsonl", option]) == 0
    assert [(config.by_hand, config.terminal) for config in seen] == [(True, False), (False, True)]


@pytest.mark.parametrize("spec", ["regex:[a-c]", "regex:[/a]"])
def test_brackets_are_printed_and_are_no_markup(spec):
    console = Console(file=io.StringIO(), width=200)
    (row,) = label_rows([{"prompt": "p", "responses": ["a", "x"]}], LabelConfig(signals=spec), console=console)
    assert row["scores"] == [1.0, 0.0]
    assert f"{spec}: mean 0.5, 2 answers scored" in console.file.getvalue()
