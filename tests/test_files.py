"""Writes that fail: one line with the path, the reason and the room, whatever library was writing."""

import resource
import signal
import sqlite3

import pytest
import torch
from safetensors.torch import save_file

from dpo_fast.errors import WriteError
from dpo_fast.files import write_errors, write_folder_atomically

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
