"""No room left, wherever a run writes: one line, exit code 1, and after making room the same bits."""

import json
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_runs import QUIET, assert_same_weights

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig
from dpo_fast.model.policy import Policy
from dpo_fast.training.loop import Trainer
from dpo_fast.training.metrics import METRICS_FILE
from dpo_fast.training.run import train
from dpo_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """Folder of the final model of a run that always had room."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"output_dir": str(folder / "run"), "reference_store": str(folder / "reference.sqlite")}
    sizes = {"max_length": 64, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 6}
    return train(DPOConfig(model=base, data=rows, save_steps=2, logging_steps=1, **sizes, **settings)).model_dir


@pytest.fixture
def limit_file_size():
    """Sets the size that a file of this process may have; lifted at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    yield limit
    limit()


def run_command(config, capsys):
    """Exit code and last line of `dpo-fast train`."""
    words = [f"--{name}={json.dumps(value)}" for name, value in vars(config).items() if value is not None]
    code = main(["train", *(word.replace('="', "=").removesuffix('"') for word in words)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error.strip().splitlines()[-1]


# Owner and name of a function, the call at which the limit comes, the limit in bytes, the file that is named.
MOMENTS = {
    "a checkpoint's weights": (Trainer, "train_step", 3, 50_000, "run/checkpoint-4"),
    "a checkpoint's state": (Trainer, "train_step", 3, 110_000, "run/checkpoint-4"),
    "metrics": (Trainer, "train_step", 3, 2_500, f"run/{METRICS_FILE}"),
    "the final model": (Trainer, "save_final", 1, 50_000, "run/final"),
    "the settings": (RunFolder, "begin", 1, 1_000, "run/config.yaml"),
    "the reference": (Policy, "score", 4, 10_000, "reference.sqlite"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_size_limit_is_one_line_and_loses_nothing(
    config, tmp_path, monkeypatch, capsys, limit_file_size, whole, moment
):
    owner, name, call, num_bytes, file = MOMENTS[moment]
    plain, calls = getattr(owner, name), []

    def limited(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            limit_file_size(num_bytes)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        code, error = run_command(config(save_steps=2), capsys)
        limit_file_size()
    assert code == 1
    for part in (str(tmp_path / file), "bytes free", f"files limited to {num_bytes:,} bytes", "ree disk space"):
        assert part in error
    resumed = train(config(save_steps=2, resume="auto"), console=QUIET)
    assert_same_weights(resumed.model_dir, whole)
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_bytes_that_a_checkpoint_needs_are_named(config, tmp_path, monkeypatch, capsys, limit_file_size):
    train(config(save_steps=6), console=QUIET)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    needed = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "training_state.pt"))
    limit_file_size(50_000)
    _, error = run_command(config(save_steps=6, overwrite=True), capsys)
    limit_file_size()
    (named,) = (word.replace(",", "") for word in error.split("(")[1].split(" bytes needed")[:1])
    # The files hold names and headers besides.
    assert 0.9 * needed < int(named) <= needed


@contextmanager
def small_disk(folder, kib):
    """A file system of so many KiB."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leaving):
    """Fill a disk up to so many free bytes."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - leaving)))
    return filler


@pytest.mark.parametrize("leaving", [0, 8_000, 100_000, 300_000])
def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path, monkeypatch, capsys, whole, leaving):
    """Full from the fourth step on, with room for a part of what comes."""
    with small_disk(tmp_path / "disk", 4096) as disk:
        settings = {"save_steps": 2, "output_dir": str(disk / "run")}
        step, fillers = Trainer.train_step, []

        def filling(self):
            if self.step == 3:
                fillers.append(fill(disk, leaving))
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", filling)
            code, error = run_command(config(**settings), capsys)
        assert code == 1
        assert str(disk / "run") in error
        assert "No space left on device" in error or "cut short" in error
        fillers[0].unlink()
        resumed = train(config(**settings, resume="auto"), console=QUIET)
        assert_same_weights(resumed.model_dir, whole)
        assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4, 5, 6]
        assert not list((Path(settings["output_dir"])).glob(".*"))


def test_a_full_disk_of_the_reference_store_keeps_what_was_scored(config, tmp_path, capsys, monkeypatch, whole):
    with small_disk(tmp_path / "disk", 1024) as disk:
        store = {"reference_store": str(disk / "reference.sqlite"), "max_tokens_per_batch": 30}
        score, fillers = Policy.score, []

        def filling(self, batch):
            if len(fillers) == 0 and (disk / "reference.sqlite").exists():
                fillers.append(fill(disk, 40_000))
            return score(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(Policy, "score", filling)
            code, error = run_command(config(**store), capsys)
        assert code == 1
        assert f"the reference store {disk / 'reference.sqlite'} failed" in error
        fillers[0].unlink()
        assert train(config(**store), console=QUIET).step == 6
