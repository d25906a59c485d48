"""A folder holds one run: old ones are set aside whole, foreign checkpoints and second processes are refused."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attacks import flip_a_bit
from small_runs import QUIET, assert_same_weights, finish, start_train, wait_for

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.files import digest_of
from dpo_fast.training.checkpoint import load_state, verify_checkpoint
from dpo_fast.training.loop import STATE_FILE, STATE_TYPES, Trainer
from dpo_fast.training.run import train

pytestmark = pytest.mark.slow


def contents(folder):
    """Bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_sets_the_old_run_aside_whole_and_removes_it_at_the_end(config, tmp_path):
    """Killed before its first checkpoint, the new run starts again; the old run's checkpoint is out of its reach."""
    train(config(save_steps=3), console=QUIET)
    old = contents(tmp_path / "run")
    new = {"save_steps": 4, "learning_rate": 5e-3}
    log = tmp_path / "log"
    process = start_train(config(overwrite=True, **new), log, slow=("dpo_fast.training.loop:Trainer.train_step",))
    wait_for(process, log, "begins train_step", count=2)
    process.kill()
    process.join()
    (aside,) = tmp_path.glob("run.replaced-by-*")
    assert f"set aside the old run as {aside}" in log.read_text()
    assert contents(aside) == old
    assert not list((tmp_path / "run").glob("checkpoint-*"))

    resumed = train(config(resume="auto", **new), console=QUIET)
    assert not aside.exists()
    whole = train(config(output_dir=str(tmp_path / "whole"), **new), console=QUIET)
    assert_same_weights(resumed.model_dir, whole.model_dir)
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_overwritten_twice_leaves_nothing(config, tmp_path):
    for seed in range(3):
        train(config(save_steps=3, overwrite=True, seed=seed, max_steps=3), console=QUIET)
    assert not list(tmp_path.glob("run.replaced-by-*"))


def test_death_while_the_old_run_is_set_aside_does_not_mix_two_runs(config, tmp_path, monkeypatch):
    train(config(save_steps=2), console=QUIET)
    rename = Path.rename

    def die_at_the_second(self, target):
        if self.name == "checkpoint-4":
            raise SystemExit
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_at_the_second)
        with pytest.raises(SystemExit):
            train(config(save_steps=2, overwrite=True, learning_rate=5e-3), console=QUIET)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-6 belongs to run \w+, but .* holds run \w+: choose another"):
        train(config(resume="auto", learning_rate=5e-3), console=QUIET)
    assert contents(tmp_path) == before
    train(config(overwrite=True, learning_rate=5e-3), console=QUIET)
    assert not list(tmp_path.glob("run.replaced-by-*"))


def test_broken_checkpoints_are_named_and_nothing_is_wiped(config, tmp_path):
    train(config(save_steps=3), console=QUIET)
    for step in (3, 6):
        flip_a_bit(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors", random.Random(step))
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(config(resume="auto"), console=QUIET)
    for part in ("checkpoint-6 (model.safetensors: its contents", "checkpoint-3 (model.safetensors: its contents"):
        assert part in str(error.value)
    assert contents(tmp_path / "run") == before


def test_a_finished_run_without_checkpoints_is_set_aside(config, tmp_path, monkeypatch):
    train(config(), console=QUIET)
    before = contents(tmp_path / "run")

    def die(self):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(SystemExit):
            train(config(resume="auto"), console=QUIET)
    (aside,) = tmp_path.glob("run.replaced-by-*")
    assert contents(aside) == before
    train(config(resume="auto"), console=QUIET)
    assert not aside.exists()


def test_a_run_may_be_continued_in_another_folder_but_not_in_another_runs(config, tmp_path):
    whole = train(config(save_steps=3), console=QUIET)
    branch = {"resume": str(tmp_path / "run" / "checkpoint-3")}
    other = train(config(output_dir=str(tmp_path / "branch"), **branch), console=QUIET)
    assert_same_weights(whole.model_dir, other.model_dir)
    train(config(output_dir=str(tmp_path / "other")), console=QUIET)
    with pytest.raises(UserError, match=r"belongs to run \w+, but .*other holds run"):
        train(config(output_dir=str(tmp_path / "other"), **branch), console=QUIET)


def test_a_second_run_on_the_folder_is_refused_while_the_first_one_lives(config, tmp_path):
    log = tmp_path / "log"
    process = start_train(config(), log, slow=("dpo_fast.training.loop:Trainer.train_step",))
    wait_for(process, log, "begins train_step")
    for changes in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match=rf"run is in use by process {process.pid} on .*wait for it to end"):
            train(config(**changes), console=QUIET)
    assert finish(process, log) == 0
    train(config(overwrite=True), console=QUIET)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_mistake_leaves_no_empty_folder(config, tmp_path):
    with pytest.raises(UserError):
        train(config(data=str(tmp_path / "missing.jsonl")), console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    """Settings of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        **{"model": base, "data": rows, "output_dir": str(folder / "run"), "max_length": 64, "save_steps": 2},
        **{"reference_store": str(folder / "reference.sqlite"), "per_device_train_batch_size": 4, "max_steps": 3},
    }
    train(DPOConfig(**settings), console=QUIET)
    return DPOConfig(**settings, resume="auto")


def reseal(checkpoint, change):
    """Change a checkpoint's state, and let the manifest agree."""
    state = load_state(checkpoint / STATE_FILE)
    replaced = change(state)
    torch.save(replaced if isinstance(replaced, list) else state, checkpoint / STATE_FILE)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    size = (checkpoint / STATE_FILE).stat().st_size
    manifest["files"][STATE_FILE] = {"size": size, "xxh3_128": digest_of(checkpoint / STATE_FILE)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert verify_checkpoint(checkpoint) == []


def first_moment(state):
    return state["optimizer"]["state"][0]


CHANGES = {
    **{f"no {name}": lambda state, name=name: state.__delitem__(name) for name in STATE_TYPES},
    **{f"{name} is a list": lambda state, name=name: state.update({name: [1]}) for name in STATE_TYPES},
    "a list": lambda state: [state],
    "settings are no JSON": lambda state: state.update(settings="{"),
    "settings are a number": lambda state: state.update(settings="3"),
    "a loss that is a number": lambda state: state.update(settings=state["settings"].replace('"sigmoid"', "3")),
    "an empty optimizer": lambda state: state["optimizer"].clear(),
    "a group less": lambda state: state["optimizer"]["param_groups"].clear(),
    "a moment of another shape": lambda state: first_moment(state).update(exp_avg=torch.zeros(3)),
    "no second moment": lambda state: first_moment(state).pop("exp_avg_sq"),
    "a sampler elsewhere": lambda state: state["sampler"].update(step="2"),
    "hashes of other rows": lambda state: state.update(reference_digests=torch.zeros(99, dtype=torch.int64)),
    "an empty sampler": lambda state: state["sampler"].clear(),
    "an rng of another dtype": lambda state: state.update(rng=torch.zeros(5000)),
    "rows that are numbers": lambda state: state["rows"].update({"trained on": 3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resealed_state_that_does_not_fit_is_one_line(trained, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(trained.output_dir, run)
    reseal(run / "checkpoint-2", CHANGES[change])
    with pytest.raises(UserError, match=r"--resume: |not a training state") as error:
        train(replace(trained, output_dir=str(run)), console=QUIET)
    assert "\n" not in str(error.value)
