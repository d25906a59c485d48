"""Checkpoints: whole or not there, whatever kills the process."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import bitsandbytes
import pytest
import torch

from dpo_fast.checkpoint import (
    load_state,
    newest_checkpoint,
    resolve_resume,
    save_checkpoint,
    save_state,
    verify_folder,
    write_file_atomically,
    write_folder_atomically,
)
from dpo_fast.config import UserError


def write_sample(folder):
    (folder / "model.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("notes")
    os.chmod(folder / "model.bin", 0o600)


def test_saved_checkpoint_is_whole_and_readable_by_others(tmp_path):
    path = save_checkpoint(tmp_path, 5, write_sample, keep=None)
    assert path == tmp_path / "checkpoint-5"
    assert verify_folder(path) == []
    assert (path / "model.bin").stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert newest_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.bin").unlink(), "model.bin: missing"),
        (lambda p: os.truncate(p / "model.bin", 100), "model.bin: 100 bytes, expected 10240"),
        (lambda p: flip_a_bit(p / "model.bin"), "model.bin: its contents changed"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json: cannot be read"),
    ],
)
def test_damage_is_found_and_passed_over(tmp_path, damage, message, caplog):
    save_checkpoint(tmp_path, 1, write_sample, keep=None)
    broken = save_checkpoint(tmp_path, 2, write_sample, keep=None)
    damage(broken)
    (problem,) = verify_folder(broken)
    assert message in problem
    assert resolve_resume("auto", tmp_path) == tmp_path / "checkpoint-1"
    assert message in caplog.text
    with pytest.raises(UserError, match="is broken"):
        resolve_resume(str(broken), tmp_path)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, step, write_sample, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_an_older_folder_is_replaced(tmp_path):
    write_folder_atomically(tmp_path / "final", write_sample)
    write_folder_atomically(tmp_path / "final", lambda folder: (folder / "new").write_text("new"))
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == ["manifest.json", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_failing_writer_leaves_no_checkpoint_and_its_rest_is_cleaned(tmp_path):
    def fail(folder):
        write_sample(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 1, fail, keep=None)
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 2, write_sample, keep=None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_resume_names_what_is_wrong(tmp_path):
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("auto", tmp_path / "nothing") is None
    with pytest.raises(UserError, match="no such folder"):
        resolve_resume(str(tmp_path / "checkpoint-9"), tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_state(tmp_path / "training_state.pt")


KILLED = """
import os, sys
from pathlib import Path
from dpo_fast.checkpoint import save_checkpoint

def write(folder):
    for i in range(6):
        (folder / f"part-{i}").write_bytes(os.urandom(300_000))

for step in range(int(sys.argv[2]), 10**6):
    save_checkpoint(Path(sys.argv[1]), step, write, keep=2)
    print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    """Twenty kills in the middle of saves with retention; what was reported as saved is still there and whole."""
    rng = random.Random(0)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    run = tmp_path / "run"
    step = 1
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, str(script), str(run), str(step)], stdout=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        saved = [int(line) for line in (first + rest).split()]
        visible = sorted(run.glob("checkpoint-*"))
        assert visible
        assert [verify_folder(path) for path in visible] == [[] for _ in visible]
        newest = newest_checkpoint(run)
        assert int(newest.name.split("-")[1]) >= saved[-1]
        step = saved[-1] + 1


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_optimizer_state_round_trips_bit_for_bit(tmp_path, optim):
    """Both kinds of parameters: bitsandbytes keeps fp32 state below 4096 elements."""

    def build():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(100, 100)), torch.nn.Parameter(torch.randn(7))]
        make = torch.optim.AdamW if optim == "adamw" else bitsandbytes.optim.AdamW8bit
        return parameters, make(parameters, lr=1e-2)

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    parameters, optimizer = build()
    for seed in range(3):
        step(parameters, optimizer, seed)
    save_state(tmp_path / "state.pt", {"optimizer": optimizer.state_dict(), "weights": [p.data for p in parameters]})
    step(parameters, optimizer, 3)

    again, resumed = build()
    state = load_state(tmp_path / "state.pt")
    for p, w in zip(again, state["weights"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(state["optimizer"])
    step(again, resumed, 3)
    for left, right in zip(parameters, again, strict=True):
        assert torch.equal(left, right)


def test_file_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "scores.jsonl"
    write_file_atomically(path, json.dumps({"a": 1}))
    write_file_atomically(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["scores.jsonl"]
