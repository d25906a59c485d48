"""Checkpoints: folders that `files` makes whole, with the state of their run.

Retention renames a folder to a trash name before it deletes, so a visible folder is never half gone.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_fast.errors import UserError
from dpo_fast.files import _REPLACED, MANIFEST, _publish, _remove, _writing, verify_folder

logger = logging.getLogger("dpo_fast")
_CHECKPOINT = re.compile(rf"(?:{re.escape(_REPLACED)})?checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], *, keep: int | None, needed: int | None = None
) -> Path:
    """Write `output_dir/checkpoint-{step}`, then remove the oldest checkpoints before it.

    Args:
        output_dir: folder of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        keep: checkpoints that stay, the new one among them; None keeps all. One of a later step, left by a run that
            was resumed from an earlier step, counts but is never removed.
        needed: bytes that it takes, for the message if there is no room.

    Raises:
        WriteError: the folder cannot be written; checkpoints that were there stay.
    """
    path = output_dir / f"checkpoint-{step}"
    with _writing(path, needed=needed):
        _publish(path, write, {"step": step})
        if keep is not None:
            existing = sorted(checkpoints(output_dir))
            for number, old in existing[: max(0, len(existing) - keep)]:
                if number < step:
                    _remove(old)
    return path


def verify_checkpoint(path: Path) -> list[str]:
    """What keeps a run from resuming from this folder: as `verify_folder`, and a model folder is no checkpoint."""
    problems = verify_folder(path)
    if not problems and "step" not in json.loads((path / MANIFEST).read_text()):
        return [f"{MANIFEST}: names no step, so this is a model without the state of its run"]
    return problems


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if it has none. Broken ones are skipped with a warning.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    broken: list[str] = []
    for _, path in sorted(checkpoints(output_dir), reverse=True):
        problems = verify_checkpoint(path)
        if not problems:
            for line in broken:
                logger.warning("broken and skipped: %s", line)
            return path
        broken.append(f"{path.name} ({'; '.join(problems)})")
    if broken:
        raise UserError(
            f"--resume auto: no checkpoint in {output_dir} is whole: {', '.join(broken)}. Nothing was changed: restore "
            "one of them, or start over with --overwrite true and without --resume"
        )
    return None


def resolve_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: None, the newest whole one for `auto`, or the folder that is named.

    Raises:
        UserError: the named folder is missing or broken, or so are all checkpoints that `auto` finds.
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
        raise UserError(f"{path}: missing; cannot resume from this folder, it can only be loaded as a model") from error
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


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, whole or broken, in no order."""
    if not output_dir.is_dir():
        return []
    return [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
