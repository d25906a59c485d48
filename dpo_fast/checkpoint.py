"""Folders that are whole or not there, whatever kills the process and whenever.

A folder is staged under a hidden name beside its place, every file is synced, a manifest of sizes and xxh3 hashes is
written last, and one rename makes it visible. It is valid when its manifest holds. Retention renames a folder to a
trash name before it deletes, so a visible folder is never half gone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from dpo_fast.config import UserError

logger = logging.getLogger("dpo_fast")

MANIFEST = "manifest.json"
_STAGING = ".staging-"
_TRASH = ".trash-"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Write `output_dir/checkpoint-{step}` and remove all but the newest `keep` checkpoints.

    Args:
        output_dir: folder of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        keep: checkpoints that stay, the new one among them; None keeps all.
    """
    path = write_folder_atomically(output_dir / f"checkpoint-{step}", write)
    if keep is not None:
        for _, old in sorted(_checkpoints(output_dir))[: -max(keep, 1)]:
            _remove(old)
    return path


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Make the folder `path` out of what `write` puts into a staging folder; an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path.parent)
    staging = path.parent / f"{_STAGING}{uuid.uuid4().hex}"
    staging.mkdir()
    write(staging)
    manifest = {}
    for file in sorted(p for p in staging.rglob("*") if p.is_file()):
        # Libraries write weights as 0600, which another user's server could not read.
        file.chmod(0o644)
        _sync(file)
        manifest[str(file.relative_to(staging))] = _describe(file)
    _write_synced(staging / MANIFEST, json.dumps({"files": manifest}, indent=1) + "\n")
    for folder in [*(p for p in staging.rglob("*") if p.is_dir()), staging]:
        folder.chmod(0o755)
        _sync(folder)
    if path.exists():
        _remove(path)
    staging.rename(path)
    _sync(path.parent)
    return path


def write_file_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{_STAGING}{uuid.uuid4().hex}")
    _write_synced(staging, text)
    staging.rename(path)
    _sync(path.parent)


def verify_folder(path: Path) -> list[str]:
    """What is wrong with a folder of `write_folder_atomically`: one line per missing or changed file, none if whole."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: cannot be read ({error})"]
    problems = []
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name}: {file.stat().st_size} bytes, expected {expected['size']}")
        elif _describe(file) != expected:
            problems.append(f"{name}: its contents changed after it was saved")
    return problems


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Broken ones are passed over with a warning."""
    for _, path in sorted(_checkpoints(output_dir), reverse=True):
        problems = verify_folder(path)
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
    problems = verify_folder(path)
    if problems:
        raise UserError(
            f"--resume {resume}: the checkpoint is broken: {'; '.join(problems)}. "
            "--resume auto takes the newest whole one"
        )
    return path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values."""
    torch.save(state, path)


def load_state(path: Path) -> dict[str, Any]:
    """Load what `save_state` wrote; runs no code that the file may hold."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; this folder cannot be gone on with, only loaded as a model") from error
    return state


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    if not output_dir.is_dir():
        return []
    return [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]


def _clean(folder: Path) -> None:
    """Remove what runs that were killed left behind."""
    for path in folder.iterdir():
        if path.name.startswith((_STAGING, _TRASH)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(path: Path) -> None:
    trash = path.parent / f"{_TRASH}{uuid.uuid4().hex}"
    path.rename(trash)
    _sync(path.parent)
    shutil.rmtree(trash)


def _describe(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return {"size": file.stat().st_size, "xxh3_128": digest.hexdigest()}


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
