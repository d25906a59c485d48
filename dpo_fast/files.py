"""Files and folders that are whole or not there, whatever kills the process and whenever.

A folder is staged under a hidden name next to its place, every file is synced, a manifest of sizes and xxh3 hashes is
written last, and one rename makes it visible. It is valid when its manifest holds.

All of this happens under a lock on the folder around it, which the kernel drops when its holder dies. Whoever has the
lock may therefore clear away every staged and thrown folder that is there: its owner is dead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import resource
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any

import xxhash

from dpo_fast.errors import UserError, WriteError

logger = logging.getLogger("dpo_fast")

MANIFEST = "manifest.json"
_STAGING = ".dpo-fast-staging-"
_TRASH = ".dpo-fast-trash-"
# A folder that gives way to a new one of its name: no rename replaces a folder that is not empty, so for a moment
# between two renames this one is the only whole one.
_REPLACED = ".dpo-fast-replaced-"
_LEFTOVER = re.compile(rf"({re.escape(_STAGING)}|{re.escape(_TRASH)})[0-9a-f]{{32}}")


def write_folder_atomically(path: Path, write: Callable[[Path], None], *, needed: int | None = None) -> Path:
    """Make the folder `path` out of what `write` puts into a staging folder; an older one is replaced.

    Args:
        path: the folder.
        write: fills the folder that it is given.
        needed: bytes that it takes, for the message if there is no room.

    Raises:
        WriteError: the folder cannot be written; an older one stays.
    """
    with _writing(path, needed=needed):
        _publish(path, write, {})
    return path


def write_file_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is never seen half written.

    Raises:
        WriteError: the file cannot be written; an older one stays.
    """
    with _writing(path):
        staging = path.with_name(f"{_STAGING}{uuid.uuid4().hex}")
        try:
            _write_synced(staging, content)
            staging.rename(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def verify_folder(path: Path) -> list[str]:
    """What is wrong with a folder written here: one line per missing or changed file, none if it is whole.

    Files that were added later are no problem.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expectations = {str(name): (int(entry["size"]), str(entry["xxh3_128"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: cannot be read ({type(error).__name__}: {error})"]
    return [
        f"{name}: {problem}"
        for name, (size, digest) in expectations.items()
        if (problem := _file_problem(path / name, size, digest))
    ]


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time into the block.

    The kernel drops the lock when its holder dies; a lock file that was left behind holds nothing.

    Args:
        path: the lock file; its folder exists. It names its holder and is removed at the end.
        what: the thing that is held, for the message.

    Raises:
        UserError: another process is inside; the message names it.
        WriteError: the lock file cannot be made.
    """
    with write_errors(path):
        descriptor = _open_lock(path, what)
    try:
        with write_errors(path):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        # Whoever opened the file before it goes will find that it is gone, and make another.
        if _is_same_file(path, descriptor):
            path.unlink()
        os.close(descriptor)


def _open_lock(path: Path, what: str) -> int:
    """A descriptor of the lock file that is locked, and still at `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(f"{what} is in use by {holder}: wait for it to end, or stop it") from error
        except OSError as error:
            # Some network file systems have no locks; one process at a time is then up to the user.
            logger.debug("no lock on %s: %s", path, error)
        if _is_same_file(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def write_errors(path: Path, *, needed: int | None = None, cure: str = "") -> Iterator[None]:
    """Turn a failed write of `path` into one line.

    Args:
        path: what is being written; need not exist.
        needed: bytes that it takes, if known.
        cure: what to do after making room.

    Raises:
        WriteError: a write failed inside the block.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (reason := _write_failure(error)) is None:
            raise
        room = f"{path} cannot be written: {reason} ({space(path, needed)})"
        raise WriteError(f"{room}. Free disk space or choose another folder{cure and f'; {cure}'}") from error


def _write_failure(error: BaseException) -> str | None:
    """Why the system refused to write, or None for any other error.

    Only Python's own writes raise `OSError`: safetensors, torch and SQLite raise types of their own, and torch does not
    say why.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        number = re.search(r"os error (\d+)", text)
        return os.strerror(int(number[1])) if number else None
    if isinstance(error, RuntimeError) and ("inline_container.cc" in text or "PytorchStreamWriter" in text):
        return "the write was cut short"
    if isinstance(error, sqlite3.OperationalError) and re.search("disk|readonly|unable to open", text):
        return text
    return None


def space(path: Path, needed: int | None = None) -> str:
    """The bytes needed and free, and the limit on the size of a file if there is one."""
    folder = next(folder for folder in [path, *path.absolute().parents] if folder.is_dir())
    facts = [f"{shutil.disk_usage(folder).free:,} bytes free"]
    if needed is not None:
        facts.insert(0, f"{needed:,} bytes needed")
    if (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        facts.append(f"files limited to {limit:,} bytes")
    return ", ".join(facts)


@contextmanager
def _writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Hold the lock on the folder around `path`, cleared of what dead processes left in it."""
    with write_errors(path, needed=needed, cure="what was there before is whole"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            _lock(descriptor)
            _clean(path.parent)
            yield
        finally:
            os.close(descriptor)  # drops the lock


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Some network file systems cannot lock a folder. Runs have folders of their own, so this costs them nothing.
        logger.debug("no lock: %s", error)


def _publish(path: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> None:
    staging = path.parent / f"{_STAGING}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        write(staging)
        _seal(staging, facts)
    except BaseException:
        shutil.rmtree(staging)
        raise
    replaced = path.with_name(_REPLACED + path.name)
    if path.exists():
        path.rename(replaced)
    staging.rename(path)
    _sync(path.parent)
    if replaced.exists():
        _remove(replaced)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Bring the files to the disk, and then the manifest that speaks for them."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        assert file != folder / MANIFEST, "the manifest's name is taken"
        # Libraries write weights as 0600, which another user's server could not read.
        file.chmod(0o644)
        _sync(file)
        files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "xxh3_128": digest_of(file)}
    _write_synced(folder / MANIFEST, json.dumps(facts | {"files": files}, indent=1) + "\n")
    for inner in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        inner.chmod(0o755)
        _sync(inner)


def _file_problem(file: Path, size: int, digest: str) -> str:
    """What is wrong with a file, or an empty string; the cheap questions first."""
    try:
        if not file.is_file():
            return "missing"
        if (found := file.stat().st_size) != size:
            return f"{found} bytes, expected {size}"
        return "" if digest_of(file) == digest else "its contents changed after it was saved"
    except OSError as error:
        return f"cannot be read ({error})"


def _clean(folder: Path) -> None:
    """Remove what processes that were killed left behind, and put a folder back whose replacement never came."""
    for path in folder.iterdir():
        if path.name.startswith(_REPLACED):
            place = folder / path.name.removeprefix(_REPLACED)
            if place.exists():
                _remove(path)
            else:
                path.rename(place)
        elif _LEFTOVER.fullmatch(path.name):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except PermissionError as error:  # another user's, in a folder that is shared
                logger.warning("%s is left over and cannot be removed: %s", path, error)


def _remove(path: Path) -> None:
    trash = path.parent / f"{_TRASH}{uuid.uuid4().hex}"
    path.rename(trash)
    # The new name must be on the disk before the first file is gone.
    _sync(path.parent)
    shutil.rmtree(trash)


def digest_of(file: Path) -> str:
    """xxh3_128 of a file's contents."""
    with file.open("rb") as stream:
        return file_digest(stream, xxhash.xxh3_128).hexdigest()


def _write_synced(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(0o644)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
