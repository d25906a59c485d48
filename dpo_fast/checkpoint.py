"""Folders that are whole or not there, whatever kills the process and whenever.

A folder is staged under a hidden name beside its place, every file is synced, a manifest of sizes and xxh3 hashes is
written last, and one rename makes it visible. It is valid when its manifest holds. Retention renames a folder to a
trash name before it deletes, so a visible folder is never half gone.

All of this happens under a lock on the folder around it, which the kernel drops when its holder dies. Whoever has the
lock may therefore clear away every staged and thrown folder that is there: its owner is dead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from dpo_fast.config import UserError

logger = logging.getLogger("dpo_fast")

MANIFEST = "manifest.json"
_STAGING = ".dpo-fast-staging-"
_TRASH = ".dpo-fast-trash-"
# A folder that gives way to a new one of its name: no rename replaces a folder that is not empty, so for a moment
# between two renames this one is the only whole one.
_REPLACED = ".dpo-fast-replaced-"
_LEFTOVER = re.compile(rf"({re.escape(_STAGING)}|{re.escape(_TRASH)})[0-9a-f]{{32}}")
_CHECKPOINT = re.compile(rf"(?:{re.escape(_REPLACED)})?checkpoint-(\d+)")


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Write `output_dir/checkpoint-{step}`, then remove the oldest checkpoints before it.

    Args:
        output_dir: folder of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        keep: checkpoints that stay, the new one among them; None keeps all. One of a later step, left by a run that
            was taken up again further back, counts but is never removed.

    Raises:
        UserError: the folder cannot be written; checkpoints that were there stay.
    """
    path = output_dir / f"checkpoint-{step}"
    with _writing(path):
        _publish(path, write, {"step": step})
        if keep is not None:
            existing = sorted(_checkpoints(output_dir))
            for number, old in existing[: max(0, len(existing) - keep)]:
                if number < step:
                    _remove(old)
    return path


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Make the folder `path` out of what `write` puts into a staging folder; an older one is replaced.

    Raises:
        UserError: the folder cannot be written; an older one stays.
    """
    with _writing(path):
        _publish(path, write, {})
    return path


def write_file_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half written.

    Raises:
        UserError: the file cannot be written; an older one stays.
    """
    with _writing(path):
        staging = path.with_name(f"{_STAGING}{uuid.uuid4().hex}")
        try:
            _write_synced(staging, text)
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


def verify_checkpoint(path: Path) -> list[str]:
    """What keeps a run from going on from this folder: as `verify_folder`, and a model folder is no checkpoint."""
    problems = verify_folder(path)
    if not problems and "step" not in json.loads((path / MANIFEST).read_text()):
        return [f"{MANIFEST}: names no step, so this is a model without the state of its run"]
    return problems


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Broken ones are passed over with a warning."""
    for _, path in sorted(_checkpoints(output_dir), reverse=True):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        logger.warning("%s is broken and passed over: %s", path, "; ".join(problems))
    return None


def resolve_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from: None, the newest whole one for `auto`, or the folder that is named.

    Raises:
        UserError: the named folder is missing or broken.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest_checkpoint(output_dir)
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"--resume {resume}: no such folder; expected `auto` or a checkpoint-N folder")
    problems = verify_checkpoint(path)
    if problems:
        raise UserError(
            f"--resume {resume}: the checkpoint is broken: {'; '.join(problems)}. "
            "Expected a checkpoint-N folder; --resume auto takes the newest whole one"
        )
    return path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values, nested in dicts, lists and tuples.

    Raises:
        TypeError: something else is in it, which `load_state` would refuse when it is too late.
    """
    _check_plain(state, "state")
    torch.save(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Load what `save_state` wrote, onto the CPU; runs no code that the file may hold.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; this folder cannot be gone on with, only loaded as a model") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a training state, or a damaged one; resume from another checkpoint") from error
    return state


def _check_plain(value: object, place: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, f"the keys of {place}")
            _check_plain(entry, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            _check_plain(entry, f"{place}[{number}]")
    # Exact types: NumPy's float64 is a float, too, and does not load.
    elif value is not None and not isinstance(value, torch.Tensor) and type(value) not in (bool, int, float, str):
        raise TypeError(f"{place} is a {type(value).__name__}; expected tensors and plain values")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Hold the lock on the folder around `path`, cleared of what dead processes left in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            _lock(descriptor)
            _clean(path.parent)
            yield
        finally:
            os.close(descriptor)  # drops the lock
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): free disk space or make its folder writable. What was there before "
            "is whole"
        ) from error


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
        files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "xxh3_128": _digest(file)}
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
        return "" if _digest(file) == digest else "its contents changed after it was saved"
    except OSError as error:
        return f"cannot be read ({error})"


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    return [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]


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


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
