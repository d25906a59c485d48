"""Every option of every command with values that it cannot have: one line, exit code 2, and nothing done."""

import dataclasses
import json
import re

import pytest
from oracle import save_tiny_checkpoint

from dpo_fast import cli
from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.ranges import Range

ROW = {"prompt": "a", "chosen": "b", "rejected": "c", "responses": ["b", "c"], "scores": [1.0, 0.0]}
NUMBERS = {"nan": "nan", "infinity": "inf", "huge": "1e300", "negative": "-7", "text": "many", "list": "[1, two]"}
INTEGERS = NUMBERS | {"very large": "9" * 30, "fraction": "2.5"}
CHOICES = {"unknown": "sideways", "number": "3", "empty": ""}
SWITCHES = {"text": "perhaps", "number": "7", "empty": ""}
SIGNED = (
    *("dpop_lambda", "simpo_gamma", "alphapo_alpha", "tpo_alpha", "score_scale", "f_alpha_divergence_coef"),
    *("desirable_weight", "undesirable_weight"),
)
LISTS = ("loss_weights", "signal_weights")
# Values that are odd and mean something.
UNLIMITED = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs", "min_score_gap")
MEANINGFUL = {
    **{(name, "negative"): "a sign is a choice" for name in (*SIGNED, *LISTS)},
    **{(name, "huge"): "so is a size" for name in (*SIGNED, *UNLIMITED)},
    **{(name, "huge"): "so is a size" for name in ("beta", "temperature", "adam_epsilon", "discopop_tau")},
    ("head_memory_budget_gib", "huge"): "as much as there is",
}


class Reached(Exception):
    """The command has begun to work."""


def fields():
    for name, command in cli.COMMANDS.items():
        for field in dataclasses.fields(command.config):
            yield name, field


def wrong_values(field):
    kind = str(field.type)
    if "Literal" in kind or "Choice" in kind or kind in ("TruncationMode", "TrainOn"):
        return CHOICES
    if kind.startswith("bool"):
        return SWITCHES
    if kind.startswith("int"):
        return INTEGERS
    if kind.startswith("float") or "list[float]" in kind:
        return NUMBERS
    if "dict" in kind:
        return {"text": "perhaps", "number": "3"}
    may_be_empty = field.default == "" or field.name.endswith("_column")
    return {"zero byte": "a\0b"} | ({} if may_be_empty else {"empty": ""})


CASES = [
    pytest.param(command, field.name, label, text, id=f"{command}-{field.name}-{label}")
    for command, field in fields()
    for label, text in wrong_values(field).items()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    save_tiny_checkpoint(folder / "m")
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "run").mkdir()
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    """Of each command, enough to work."""
    model, data, out = str(folder / "m"), str(folder / "rows.jsonl"), str(tmp_path / "out")
    rows = ["--model", model, "--data", data]
    return {
        "demo": ["--out", out],
        "train": [*rows, "--output_dir", out],
        "score": [*rows, "--out", f"{out}.jsonl"],
        "sample": [*rows, "--out", f"{out}.jsonl"],
        "label": ["--data", data, "--out", f"{out}.jsonl", "--signals", "json"],
        "pair": ["--data", data, "--out", f"{out}.jsonl"],
        "eval": [*rows, "--reference", model, "--out", f"{out}.json"],
        "inspect": [*rows, "--reference", model],
        "report": [str(folder / "run")],
        "plan": ["--model", model, "--gpu", "h100-80"],
    }


@pytest.fixture
def stubs(monkeypatch):
    """No command runs: whoever comes so far has accepted its settings."""

    def reached(config):
        raise Reached

    for name, command in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(command, run=reached))


def outcome(words):
    """The exit code of a command; 0 if it has begun to work."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code
    except Reached:
        return 0


def assert_one_line(code, capsys, command):
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("see: ")]
    assert code == 2, errors
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"dpo-fast {command}: error: ")
    return errors[0]


def test_there_are_enough_cases():
    assert len(CASES) >= 173


@pytest.mark.parametrize(("command", "name", "label", "text"), CASES)
def test_a_wrong_value_is_one_line(command, name, label, text, arguments, stubs, capsys):
    words = [] if name == "run" else arguments[command]
    code = outcome([command, *words, f"--{name}={text}"])
    if code != 0 or (name, label) not in MEANINGFUL:
        assert name in assert_one_line(code, capsys, command)


PLACES = ("folder", "missing", "broken", "below a file")
# What a command reads and writes, and which places are right for it.
OPTIONS = {
    "train": {
        **dict.fromkeys(("data", "eval_data", "chat_template", "model", "ref_model", "resume"), ()),
        **{"reference_store": ("missing",), "output_dir": ("folder", "missing")},
    },
    "score": {
        **dict.fromkeys(("data", "chat_template", "model"), ()),
        **{"reference_store": ("missing",), "out": ("missing", "broken")},
    },
    "sample": {"data": (), "model": (), "chat_template": (), "out": ("missing",)},
    "label": {"data": (), "out": ("missing",)},
    "pair": {"data": (), "out": ("missing",)},
    "eval": {"data": (), "model": (), "reference": (), "prompts": (), "out": ()},
    "inspect": {"data": (), "model": (), "reference": (), "out": ()},
    "report": {"run": (), "out": ()},
    "plan": {"model": (), "data": (), "out": ()},
}
WRONG_PLACES = [
    pytest.param(command, name, place, id=f"{command}-{name}-{place}")
    for command, options in OPTIONS.items()
    for name, right in options.items()
    for place in PLACES
    if place not in right
]


@pytest.mark.parametrize(("command", "name", "place"), WRONG_PLACES)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_place_is_one_line(command, name, place, arguments, tmp_path, monkeypatch, capsys):
    """The commands themselves, on a model that could be loaded, up to the file or folder that is wrong."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "broken").write_bytes(b"\xff\x00{]")
    where = {"below a file": "broken/x"}.get(place, place)
    words = [] if name == "run" else arguments[command]
    words = [*words, *(["--max_steps", "1"] if command == "train" else [])]
    words = [*words, *(["--signals", "json"] if name == "prompts" else [])]
    assert_one_line(outcome([command, *words, f"--{name}={tmp_path / where}"]), capsys, command)


def test_every_number_has_a_range():
    """Or is one of those that any finite number is right for."""
    for _, field in fields():
        kind = str(field.type)
        if kind.startswith(("int", "float")) or "list[float]" in kind:
            assert "range" in field.metadata or field.name in (*SIGNED, *LISTS), field.name


def test_python_callers_are_told_the_same():
    with pytest.raises(UserError, match=r"^--max_rows -1: expected a number above 0, or null$"):
        DPOConfig(max_rows=-1)
    with pytest.raises(UserError, match=r"^--output_dir : expected a value, found none$"):
        DPOConfig(output_dir="")
    config = DPOConfig()
    config.beta = float("nan")
    with pytest.raises(UserError, match=r"^--beta nan: expected a number above 0$"):
        config.check()


@pytest.mark.parametrize(
    ("range_", "inside", "outside", "text"),
    [
        (Range(above=0), [1, 1e-9], [0, -1, float("inf"), float("nan"), 2**31], "expected a number above 0"),
        (Range(least=0), [0, 5], [-1], "expected a number, 0 or above"),
        (Range(least=0, below=1), [0, 0.5], [1, -0.1], "expected a number in [0, 1)"),
        (Range(above=0, most=1e6), [1e6], [0, 1e7], "expected a number in (0, 1000000]"),
        (Range(least=0, most=2**32 - 1), [2**32 - 1], [2**32], "expected a number in [0, 4294967295]"),
        (Range(), [-1e300, 3], [float("nan")], "expected a finite number"),
    ],
)
def test_ranges(range_, inside, outside, text):
    assert all(value in range_ for value in inside)
    assert not any(value in range_ for value in outside)
    assert str(range_) == text


FILES = {
    "a slip and a stranger": (
        "lerning_rate: 1\nfoo: 2\n",
        r"--lerning_rate \(did you mean --learning_rate\?\), --foo$",
    ),
    "names of others": ("lr: 1\nlora_rank: 8\n", r"--lr \(here --learning_rate\), --lora_rank \(here --lora_r\)"),
    "twice": ("beta: 1\nbeta: 2\n", r"line 2: 'beta' occurs twice"),
    "a list": ("- a\n", r"holds a list; expected `name: value` lines"),
    "not YAML": ("a: [1\n", r"line \d: "),
    "a wrong value": ("max_rows: -1\n", r"--max_rows -1: expected a number above 0"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_of_settings_is_read_with_care(fault, stubs, tmp_path, capsys):
    content, message = FILES[fault]
    path = tmp_path / "train.yaml"
    path.write_text(content)
    for words in (["--config", str(path)], [f"--config={path}"]):
        line = assert_one_line(outcome(["train", *words]), capsys, "train")
        assert "max_rows" in line or str(path) in line
        assert re.search(message, line), line


@pytest.mark.parametrize("place", ["missing", "folder", "bytes"])
def test_a_file_of_settings_that_cannot_be_read_is_named(place, stubs, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"a\xff: 1")
    line = assert_one_line(outcome(["train", "--config", str(tmp_path / place)]), capsys, "train")
    assert str(tmp_path / place) in line


def test_unknown_options_are_named_all_at_once_with_what_they_are_called_here(stubs, capsys):
    words = ["--lr", "3", "--foo", "2", "--bs=4", "--lerning-rate", "2", "--dataset_name", "x", "--deepspeed", "y"]
    line = assert_one_line(outcome(["train", *words]), capsys, "train")
    for part in (
        *("--lr (here --learning_rate)", "--foo,", "--bs (here --per_device_train_batch_size)"),
        *(
            "--lerning_rate (did you mean --learning_rate?)",
            "--dataset_name (here --data)",
            "--deepspeed (this command",
        ),
    ):
        assert part in line
    line = assert_one_line(outcome(["score", "--batch_size", "3", "--output", "x"]), capsys, "score")
    assert "--output (here --out)" in line
    assert "per_device" not in line


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    assert "usage: dpo-fast COMMAND" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("dpo_fast.data.rows.read_rows", lambda *_: pytest.fail("rows were read"))
    for command in ("train", "score", "eval", "inspect", "sample"):
        for device in ("meta", "mps", "cuda:77", "tpu"):
            code = outcome([command, *arguments[command], "--device", device])
            assert "--device " in assert_one_line(code, capsys, command)
