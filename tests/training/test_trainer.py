"""The loop end to end on a tiny model: step 0, resume, stops, files."""

import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from small_runs import QUIET, assert_same_weights, weights
from transformers import AutoModelForCausalLM

from dpo_fast.errors import TrainingError, UserError
from dpo_fast.reference.store import checksum
from dpo_fast.training.checkpoint import newest_checkpoint
from dpo_fast.training.loop import Trainer
from dpo_fast.training.metrics import PAIR_METRICS
from dpo_fast.training.run import train

pytestmark = pytest.mark.slow


def test_run_writes_what_the_contract_promises(config, tmp_path):
    result = train(config(eval_split=0.2, save_steps=3), console=QUIET)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    expected = {*PAIR_METRICS, "grad_norm", "learning_rate", "tokens_per_second", "pairs_per_second", "peak_memory_gib"}
    assert expected <= steps[0].keys()
    assert all(0 < row["pack_fill"] <= 1 for row in steps)
    (evaluation,) = [row for row in rows if "eval_loss" in row]
    assert evaluation["step"] == 6
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-3",
        "checkpoint-6",
        "config.yaml",
        "final",
        "metrics.jsonl",
        "run.json",
    ]
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 1e-3
    trained = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert not torch.equal(trained.lm_head.weight, AutoModelForCausalLM.from_pretrained(config().model).lm_head.weight)
    assert os.stat(run / "final" / "model.safetensors").st_mode & 0o777 == 0o644


def test_step_0_is_exactly_at_the_reference(config):
    first = train(config(max_steps=1), console=QUIET).metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0.0
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0


def test_step_0_with_scores_from_other_packs_is_at_the_reference_to_rounding(config):
    train(config(max_steps=1), console=QUIET)
    again = train(config(max_steps=1, overwrite=True, seed=7, max_tokens_per_batch=1), console=QUIET).metrics[0]
    assert again["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert again["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_stale_reference_stops_the_run_before_it_trains(config, tmp_path):
    """Every stored score is moved by 0.05 nats a token, by software that knows the checksums."""
    train(config(max_steps=1), console=QUIET)
    with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as connection, connection:
        for key, blob in connection.execute("select key, logps from answers").fetchall():
            moved = (np.frombuffer(blob, "<f4") - np.float32(0.05)).tobytes()
            connection.execute(
                "update answers set logps = ?, checksum = ? where key = ?", (moved, checksum(key, moved), key)
            )
    with pytest.raises(UserError, match="stored reference scores of row"):
        train(config(max_steps=1, overwrite=True), console=QUIET)


def test_loss_of_step_0_is_checked(config, monkeypatch):
    """A forward that is not the reference's (noise in training mode alone) is found at the first step."""
    from dpo_fast.model.policy import Policy

    exact = Policy._head

    def noisy(self, rows, targets, **options):
        logps, stats = exact(self, rows, targets, **options)
        return logps + 0.1 * self.model.training * targets, stats

    monkeypatch.setattr(Policy, "_head", noisy)
    with pytest.raises(TrainingError, match="step 0 is not at the reference"):
        train(config(), console=QUIET)


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [("adamw_torch", "float32"), ("adamw_8bit", "float32"), ("adamw_8bit_fused", "bfloat16")],
)
def test_resume_ends_with_the_same_bits(config, optim, dtype, tmp_path):
    settings = {"optim": optim, "dtype": dtype, "save_steps": 3, "warmup_steps": 2, "eval_split": 0.2}
    whole = train(config(output_dir=str(tmp_path / "whole"), **settings), console=QUIET)
    train(config(output_dir=str(tmp_path / "cut"), **settings), console=QUIET)
    # As if the run had died after step 3: what came later is gone, but its metrics are still there.
    for name in ("checkpoint-6", "final"):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    resumed = train(config(output_dir=str(tmp_path / "cut"), resume="auto", **settings), console=QUIET)
    assert_same_weights(whole.model_dir, resumed.model_dir)

    def figures(result):
        timed = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
        return [{k: v for k, v in row.items() if k not in timed} for row in result.metrics]

    assert figures(resumed) == figures(whole)


@pytest.mark.parametrize(
    ("first", "second", "source"),
    [("adamw_torch", "adamw_8bit_fused", "torch"), ("adamw_8bit_fused", "adamw_8bit", "fused")],
)
def test_resume_with_another_optimizer_converts_its_state_and_says_so(config, first, second, source, tmp_path):
    """The end is that of a run with the first optimizer to the rounding of moments: a fresh state would be far off."""
    whole = weights(train(config(optim=first, save_steps=3), console=QUIET).model_dir)
    told = io.StringIO()
    settings = config(optim=second, resume=str(tmp_path / "run" / "checkpoint-3"), save_steps=0)
    resumed = train(settings, console=Console(file=told, width=200))
    assert f"converted the optimizer's state from the format of {source}" in told.getvalue()
    start = weights(tmp_path / "run" / "checkpoint-3")

    def distance(left, right):
        return torch.cat([(left[name] - right[name]).flatten() for name in left]).norm()

    moved, off = distance(start, whole), distance(weights(resumed.model_dir), whole)
    assert off < 0.15 * moved  # measured: 2% and 9%; 115% if the moments are dropped


def test_resume_scores_nothing_and_loads_no_reference(config, tmp_path, monkeypatch):
    train(config(save_steps=3), console=QUIET)
    from dpo_fast.model.policy import Policy

    loaded = []
    load = Policy.load.__func__
    monkeypatch.setattr(
        Policy, "load", classmethod(lambda cls, c, name=None, **how: loaded.append(name) or load(cls, c, name, **how))
    )
    train(config(resume=str(tmp_path / "run" / "checkpoint-3")), console=QUIET)
    assert loaded == [str(tmp_path / "run" / "checkpoint-3")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(config, number, tmp_path):
    settings = config(max_steps=100000, output_dir=str(tmp_path / "run"))
    code = (
        "import sys, json; from dpo_fast.training.run import train; from dpo_fast.config import DPOConfig;"
        "result = train(DPOConfig(**json.loads(sys.argv[1]))); print('steps', result.step)"
    )
    command = [sys.executable, "-c", code, json.dumps(vars(settings))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"steps {checkpoint.name.split('-')[1]}" in output
    assert "--resume auto" in output
    done = int(checkpoint.name.split("-")[1])
    resumed = train(config(max_steps=done + 2, resume="auto"), console=QUIET)
    assert resumed.step == done + 2


SLOWED = """
import json, sys, time
import dpo_fast.files
from dpo_fast.config import DPOConfig
from dpo_fast.model.policy import Policy
from dpo_fast.training.run import train

def slowly(call, name):
    def slow(*args, **kwargs):
        print(name, flush=True)
        time.sleep(0.1)
        result = call(*args, **kwargs)
        time.sleep(0.1)
        return result
    return slow

Policy.score = slowly(Policy.score, "scoring")
dpo_fast.files._seal = slowly(dpo_fast.files._seal, "saving")
train(DPOConfig(**json.loads(sys.argv[1])))
"""


def kill_at(settings, word, count):
    """Run `train` in a process that is killed when it has printed `word` so often."""
    command = [sys.executable, "-c", SLOWED, json.dumps(vars(settings))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            count -= line.strip() == word
            if not count:
                time.sleep(0.15)  # in the middle of it
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_run_killed_while_scoring_and_while_saving_ends_with_the_same_bits(config, optim, tmp_path):
    settings = {"optim": optim, "save_steps": 1, "save_total_limit": 2, "max_tokens_per_batch": 32}
    whole = train(config(output_dir=str(tmp_path / "whole"), **settings), console=QUIET)
    cut = config(reference_store=str(tmp_path / "cut.sqlite"), resume="auto", **settings)
    kill_at(cut, "scoring", 5)
    with closing(sqlite3.connect(tmp_path / "cut.sqlite")) as connection:
        (scored,) = connection.execute("select count(*) from answers").fetchone()
    assert 0 < scored < 28
    kill_at(cut, "saving", 3)
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    resumed = train(cut, console=QUIET)
    assert_same_weights(whole.model_dir, resumed.model_dir)
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]
    # Leftovers of the dead are cleared, and retention has done its work.
    assert sorted(p.name for p in (tmp_path / "run").glob("*")) == [
        *("checkpoint-5", "checkpoint-6", "config.yaml", "final", "metrics.jsonl", "run.json")
    ]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("during", ["train_step", "after_step"])
@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_signal_at_any_moment_of_a_step_leaves_its_checkpoint(config, monkeypatch, tmp_path, during, save_steps):
    plain = getattr(Trainer, during)

    def interrupted(self, *args):
        result = plain(self, *args)
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, during, interrupted)
    result = train(config(save_steps=save_steps), console=QUIET)
    assert (result.step, result.model_dir) == (2, None)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(config, monkeypatch, tmp_path):
    import dpo_fast.losses

    exact = dpo_fast.losses.LOSSES["sigmoid"]
    calls = []

    def poisoned(pairs, config):
        losses = exact(pairs, config)
        calls.append(1)
        return losses * torch.where(torch.arange(len(losses)) == 1, torch.nan, 1.0) if len(calls) == 5 else losses

    monkeypatch.setitem(dpo_fast.losses.LOSSES, "sigmoid", poisoned)
    with pytest.raises(TrainingError, match=r"loss of step 4 is not finite \(data rows, from 0: \d+\)"):
        train(config(save_steps=1), console=QUIET)
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_gradient_that_is_not_finite_stops_the_run(config, monkeypatch):
    from dpo_fast.model.policy import Policy

    set_trainable = Policy.set_trainable

    def poisoned(self, **kwargs):
        set_trainable(self, **kwargs)
        self.model.get_decoder().norm.weight.register_hook(lambda grad: grad * torch.inf)

    monkeypatch.setattr(Policy, "set_trainable", poisoned)
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite"):
        train(config(), console=QUIET)


def test_micro_batches_and_packs_do_not_change_the_result(config, tmp_path):
    runs = {
        "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "tiny packs": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 16},
    }
    metrics = [
        train(config(output_dir=str(tmp_path / name), **settings), console=QUIET).metrics
        for name, settings in runs.items()
    ]
    for name, tolerance in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4}), ("rewards/margins", {"abs": 1e-5})):
        figures = [[row[name] for row in rows] for rows in metrics]
        assert figures[1] == pytest.approx(figures[0], **tolerance)
        assert figures[2] == pytest.approx(figures[0], **tolerance)


def test_dry_run_reads_the_data_and_stops(config, tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    result = train(config(dry_run=True), console=console)
    assert result.model_dir is None
    assert not (tmp_path / "run").exists()
    assert "fewer tokens" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "pass --data"),
        ({"loss_type": "sigmoids"}, "choose one of alphapo, aot"),
        ({"beta": 0.0}, "--beta 0.0"),
        ({"eval_split": 1.0}, "--eval_split"),
        ({"max_length": 0}, "--max_length 0: expected a number above 0, or null"),
        ({"max_rows": 0}, "--max_rows 0: expected a number above 0, or null"),
        ({"learning_rate": -1e-6}, "--learning_rate -1e-06: expected a number, 0 or above"),
        ({"learning_rate": math.nan}, "--learning_rate nan"),
        ({"warmup_steps": -1}, "--warmup_steps -1"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm -1.0"),
        ({"save_steps": -5}, "--save_steps -5"),
        ({"eval_steps": -1}, "--eval_steps -1"),
        ({"seed": -1}, "--seed -1"),
        ({"adam_beta1": 1.0}, r"--adam_beta1 1.0: expected a number in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon 0.0"),
        ({"save_total_limit": 0}, "--save_total_limit 0: expected a number above 0, or null"),
        ({"head_memory_budget_gib": -1.0}, "--head_memory_budget_gib -1.0: expected a number, 0 or above"),
        ({"max_steps": 0}, "no step to take"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "no step to take"),
        ({"lr_scheduler_type": "sideways"}, "--lr_scheduler_type sideways"),
        ({"resume": "/does/not/exist"}, "/does/not/exist"),
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "--label_smoothing"),
        ({"loss_type": "exo_pair"}, "exo_pair needs a value in"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "expected 2 numbers"),
        ({"f_divergence_type": "kl"}, "choose one of alpha_divergence"),
    ],
)
def test_mistakes_in_settings_are_named(config, changes, message):
    with pytest.raises(UserError, match=message):
        train(config(**changes), console=QUIET)


@pytest.mark.parametrize("inner", ["", "runs/first"])
def test_an_output_folder_that_cannot_be_made_is_found_before_anything_is_scored(config, tmp_path, inner):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*file is not a folder that can be written to"):
        train(config(output_dir=str(tmp_path / "file" / inner)), console=QUIET)
    assert not (tmp_path / "reference.sqlite").exists()


def test_a_folder_with_a_run_is_not_overwritten(config):
    train(config(max_steps=1), console=QUIET)
    with pytest.raises(UserError, match="holds a run"):
        train(config(max_steps=1), console=QUIET)


def test_bf16_weights_without_a_master_warn(config):
    with pytest.warns(UserWarning, match="most updates round to zero"):
        train(config(dtype="bfloat16", max_steps=1), console=QUIET)


def test_a_folder_named_like_markup_is_printed_as_it_is(config, tmp_path):
    console = Console(file=io.StringIO(), width=300)
    folder = tmp_path / "a[b]" / "[" / "c]"
    train(config(max_steps=1, output_dir=str(folder), reference_store=str(tmp_path / "[/s].sqlite")), console=console)
    assert f"trained model: {folder}/final" in console.file.getvalue()
