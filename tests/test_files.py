"""Writes that fail: one line with the path, the reason and the room, whatever library was writing. Locks."""

import resource
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dpo_fast.errors import UserError, WriteError
from dpo_fast.files import hold, write_errors, write_folder_atomically

LIMIT = 100_000


@pytest.fixture
def file_size_limit():
    """Files of this process may not grow beyond LIMIT bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def fill_database(path):
    database = sqlite3.connect(path)
    database.execute("create table blobs (value blob)")
    database.execute("insert into blobs values (?)", (bytes(10 * LIMIT),))
    database.commit()


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(10 * LIMIT)),
    "safetensors": lambda path: save_file({"weight": torch.zeros(10 * LIMIT)}, path),
    "torch": lambda path: torch.save({"weight": torch.zeros(10 * LIMIT)}, path),
    "sqlite": fill_database,
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_failed_write_is_one_line_with_path_and_room(tmp_path, file_size_limit, library):
    with pytest.raises(WriteError) as error, write_errors(tmp_path / "file", needed=4_000_000):
        WRITERS[library](tmp_path / "file")
    message = str(error.value)
    assert "\n" not in message
    for part in (f"{tmp_path / 'file'} cannot be written: ", "4,000,000 bytes needed", f"limited to {LIMIT:,} bytes"):
        assert part in message


@pytest.mark.parametrize("library", WRITERS)
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path, file_size_limit, library):
    write_folder_atomically(tmp_path / "folder", lambda folder: (folder / "file").write_text("old"))
    with pytest.raises(WriteError, match="what was there before is whole"):
        write_folder_atomically(tmp_path / "folder", lambda folder: WRITERS[library](folder / "file"))
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("disk"), KeyError("a")])
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, write_errors(tmp_path / "file"):
        raise error
    assert raised.value is error


HOLDER = """
import sys
from pathlib import Path
from dpo_fast.files import hold
with hold(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path):
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    with start_holder(path) as holder:
        with (
            pytest.raises(UserError, match=f"the folder is in use by process {holder.pid} on "),
            hold(path, "the folder"),
        ):
            pass
        holder.kill()
    assert path.exists()
    with hold(path, "the folder"):
        pass
    assert not path.exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_not_taken(tmp_path, monkeypatch):
    """The second process opened the file just before its holder removed it: its lock would exclude nobody."""
    import dpo_fast.files

    path, opened = tmp_path / "lock", []
    flock = dpo_fast.files.fcntl.flock

    def holder_leaves_first(descriptor, operation):
        if not opened:
            path.unlink()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(dpo_fast.files.fcntl, "flock", holder_leaves_first)
    with hold(path, "the folder"):
        assert len(opened) == 2
        with pytest.raises(UserError, match="in use"), hold(path, "the folder"):
            pass
