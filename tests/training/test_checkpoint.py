"""Checkpoints: whole or not there, whatever kills the process."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch

from dpo_fast.errors import UserError
from dpo_fast.files import verify_folder, write_file_atomically, write_folder_atomically
from dpo_fast.training.checkpoint import (
    load_state,
    newest_checkpoint,
    resolve_resume,
    save_checkpoint,
    save_state,
    verify_checkpoint,
)
from dpo_fast.training.fused_adamw import AdamW8bitFused

pytestmark = pytest.mark.slow


def write_sample(folder):
    (folder / "model.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner").mkdir(mode=0o700)
    (folder / "inner" / "notes.txt").write_text("notes")
    os.chmod(folder / "model.bin", 0o600)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_saved_checkpoint_is_whole_and_readable_by_others(tmp_path):
    path = save_checkpoint(tmp_path, 5, write_sample, keep=None)
    assert path == tmp_path / "checkpoint-5"
    assert verify_checkpoint(path) == []
    assert json.loads((path / "manifest.json").read_text())["step"] == 5
    assert {oct(p.stat().st_mode & 0o777) for p in path.rglob("*") if p.is_file()} == {"0o644"}
    assert {oct(p.stat().st_mode & 0o777) for p in (path, path / "inner")} == {"0o755"}
    assert names(tmp_path) == ["checkpoint-5"]
    assert newest_checkpoint(tmp_path) == path


def edit_manifest(change):
    def edit(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.bin").unlink(), "model.bin: missing"),
        (lambda p: os.truncate(p / "model.bin", 100), "model.bin: 100 bytes, expected 10240"),
        (lambda p: flip_a_bit(p / "model.bin"), "model.bin: its contents changed"),
        (lambda p: flip_a_bit(p / "inner" / "notes.txt"), "inner/notes.txt: its contents changed"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: cannot be read"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json: cannot be read"),
        (edit_manifest(lambda m: m["files"]["model.bin"].pop("size")), "manifest.json: cannot be read"),
        (edit_manifest(lambda m: m.pop("step")), "names no step"),
    ],
)
def test_damage_is_found_and_passed_over(tmp_path, damage, message, caplog):
    save_checkpoint(tmp_path, 1, write_sample, keep=None)
    broken = save_checkpoint(tmp_path, 2, write_sample, keep=None)
    damage(broken)
    (problem,) = verify_checkpoint(broken)
    assert message in problem
    assert resolve_resume("auto", tmp_path) == tmp_path / "checkpoint-1"
    assert message in caplog.text
    with pytest.raises(UserError, match="is broken"):
        resolve_resume(str(broken), tmp_path)
    # Running on to the same step mends it.
    save_checkpoint(tmp_path, 2, write_sample, keep=None)
    assert resolve_resume("auto", tmp_path) == broken


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ([1, 2, 3, 4], 2, [3, 4]),
        ([8, 9, 10], 1, [10]),
        ([8, 9, 10], 0, [10]),
        ([8, 9, 10], None, [8, 9, 10]),
        # A run that was taken up again further back: the new one stays, and so does what is ahead of it.
        ([1, 2, 10, 9], 2, [9, 10]),
        ([10, 4], 1, [4, 10]),
        ([10, 11, 4], 1, [4, 10, 11]),
    ],
)
def test_retention(tmp_path, steps, keep, left):
    (tmp_path / "checkpoint-notes").mkdir()
    for step in steps[:-1]:
        save_checkpoint(tmp_path, step, write_sample, keep=None)
    save_checkpoint(tmp_path, steps[-1], write_sample, keep=keep)
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-[0-9]*")) == left
    assert (tmp_path / "checkpoint-notes").is_dir()


def test_an_older_folder_is_replaced(tmp_path):
    write_folder_atomically(tmp_path / "final", write_sample)
    write_folder_atomically(tmp_path / "final", lambda folder: (folder / "new").write_text("new"))
    assert names(tmp_path / "final") == ["manifest.json", "new"]
    assert names(tmp_path) == ["final"]
    assert verify_folder(tmp_path / "final") == []


def test_death_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 3, write_sample, keep=1)
    rename = Path.rename

    def die_before_the_second(self, target):
        if "staging" in self.name:
            raise SystemExit
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_before_the_second)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, 3, write_sample, keep=1)
    newest = resolve_resume("auto", tmp_path)
    assert newest is not None
    assert newest.name == ".dpo-fast-replaced-checkpoint-3"
    # The next save, of whatever step, puts it back.
    save_checkpoint(tmp_path, 4, write_sample, keep=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert verify_checkpoint(tmp_path / "checkpoint-3") == []


def test_a_failing_writer_leaves_nothing_behind(tmp_path):
    def fail(folder):
        write_sample(folder)
        raise OSError("No space left on device")

    save_checkpoint(tmp_path, 1, write_sample, keep=1)
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be written: No space left.*Free disk space"):
        save_checkpoint(tmp_path, 2, fail, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_only_our_own_leftovers_are_cleared(tmp_path):
    ours = [f".dpo-fast-{kind}-{digit * 32}" for kind, digit in (("staging", "a"), ("trash", "0"))]
    theirs = [".staging-area", ".trash-1000", ".dpo-fast-staging-notes"]
    for name in ours + theirs:
        (tmp_path / name / "inner").mkdir(parents=True)
    save_checkpoint(tmp_path, 1, write_sample, keep=None)
    assert names(tmp_path) == sorted([*theirs, "checkpoint-1"])


def test_a_save_waits_for_another_one_in_the_same_folder(tmp_path):
    """Otherwise the second would clear away what the first is staging."""
    script = (
        "import sys, time; from pathlib import Path; from dpo_fast.files import write_folder_atomically\n"
        "def slow(folder):\n"
        "    (folder / 'a').write_text('a'); print('staging', flush=True); sys.stdin.readline()\n"
        "write_folder_atomically(Path(sys.argv[1]), slow)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "one")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "staging\n"
        second = threading.Thread(target=write_folder_atomically, args=(tmp_path / "two", write_sample))
        second.start()
        time.sleep(0.2)
        assert not (tmp_path / "two").exists()
        other.communicate("\n")
        second.join()
    assert other.returncode == 0
    assert names(tmp_path) == ["one", "two"]
    assert verify_folder(tmp_path / "one") == verify_folder(tmp_path / "two") == []


def test_resume_names_what_is_wrong(tmp_path):
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("auto", tmp_path / "nothing") is None
    with pytest.raises(UserError, match="no such folder"):
        resolve_resume(str(tmp_path / "checkpoint-9"), tmp_path)
    final = write_folder_atomically(tmp_path / "final", write_sample)
    with pytest.raises(UserError, match="names no step"):
        resolve_resume(str(final), tmp_path)


# One process forks the savers, so that torch is imported once and not with every kill.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from dpo_fast.files import verify_folder, write_folder_atomically
from dpo_fast.training.checkpoint import newest_checkpoint, save_checkpoint

run, rng = Path(sys.argv[1]), random.Random(0)

def write(folder):
    for i in range(4):
        (folder / f"part-{i}").write_bytes(os.urandom(10_000))

remove_folder = shutil.rmtree

def on_a_slow_disk(folder):
    for file in list(folder.rglob("*")):
        file.unlink()
        time.sleep(0.002)
    remove_folder(folder)

def save_for_ever(step, pipe):
    shutil.rmtree = on_a_slow_disk
    while True:
        save_checkpoint(run, step, write, keep=2)
        os.write(pipe, b"%d\\n" % step)
        if step % 3 == 0:
            save_checkpoint(run, step, write, keep=2)
            write_folder_atomically(run / "final", write)
        step += 1

step = 1
for kill in range(int(sys.argv[2])):
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        save_for_ever(step, writing)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        committed = int((first + lines.read()).split()[-1])
    for path in run.iterdir():
        if not path.name.startswith(".") and verify_folder(path):
            sys.exit(f"kill {kill}: {path} is visible and broken: {verify_folder(path)}")
    newest = newest_checkpoint(run)
    if newest is None or int(newest.name.split("-")[-1]) < committed:
        sys.exit(f"kill {kill}: {committed} was committed, but {newest} is the newest")
    step = committed + 1
save_checkpoint(run, step, write, keep=2)
print("left:", *sorted(p.name for p in run.iterdir()))
"""


def test_sigkill_at_any_moment_leaves_only_whole_folders(tmp_path):
    """Kills in the middle of saves, replacements and retention; what was reported as saved is there and whole."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), "25"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    left = result.stdout.split()[1:]
    assert all(name.startswith("checkpoint-") or name == "final" for name in left), left
    assert sum(name.startswith("checkpoint-") for name in left) == 2


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=False),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adamw 8-bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2),
    "adamw 8-bit fused": lambda parameters: AdamW8bitFused(parameters, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_round_trips_bit_for_bit(tmp_path, optimizer, dtype):
    """All sizes of parameters: bitsandbytes keeps fp32 state below 4096 elements."""

    def build():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (10_000, 4097, 4096, 4095, 1)]
        return parameters, OPTIMIZERS[optimizer](parameters)

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()

    parameters, whole = build()
    for seed in range(3):
        step(parameters, whole, seed)
    before = {"optimizer": whole.state_dict(), "weights": [p.data for p in parameters], "rng": torch.get_rng_state()}
    save_state(tmp_path / "state.pt", before)
    state = load_state(tmp_path / "state.pt")
    assert_same(before, state)
    for seed in (3, 4):
        step(parameters, whole, seed)

    again, resumed = build()
    for p, w in zip(again, state["weights"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(state["optimizer"])
    for seed in (3, 4):
        step(again, resumed, seed)
    assert_same([p.data for p in parameters], [p.data for p in again])
    assert_same(whole.state_dict(), resumed.state_dict())


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype is right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    """torch.save takes anything; the safe load would refuse it when the run is resumed, which is too late."""
    for value in (np.float64(1), np.zeros(2), {1}, Path("x")):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
            save_state(tmp_path / "state.pt", {"a": [1, value]})
    assert not (tmp_path / "state.pt").exists()


def test_a_state_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "training_state.pt"
    with pytest.raises(UserError, match=r"training_state\.pt: missing"):
        load_state(path)
    save_state(path, {"a": torch.arange(1000)})
    for broken in (b"", b"not a zip", path.read_bytes()[:1000]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"training_state\.pt: not a training state, or a damaged one"):
            load_state(path)


def test_file_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "scores.jsonl"
    write_file_atomically(path, "1\n")
    write_file_atomically(path, "2\n")
    assert path.read_text() == "2\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["scores.jsonl"]
    with pytest.raises(UserError, match="cannot be written"):
        write_file_atomically(path / "inner", "3\n")
