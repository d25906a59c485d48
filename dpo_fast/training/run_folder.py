"""The folder of a run: held by one process, and never with files of two runs in it.

`run.json` holds the run's id, which every checkpoint repeats. `--overwrite true` moves the old run's files to a folder
next to this one; they are removed when the new run has written its final model. The new id is written before the first
file moves, so a run that is killed in between cannot resume from what is left of the old one.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_fast.errors import UserError
from dpo_fast.files import hold, write_errors, write_file_atomically
from dpo_fast.training.checkpoint import checkpoints
from dpo_fast.training.metrics import DAMAGED_METRICS_FILE, METRICS_FILE

logger = logging.getLogger("dpo_fast")

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
FINAL_FOLDER = "final"
MERGED_FOLDER = "merged"
CHOICES_FILE = "autotune.json"
_LOCK_FILE = ".dpo-fast-lock"
# What a run writes besides its checkpoints, and the report on it.
_FILES = (FINAL_FOLDER, MERGED_FOLDER, METRICS_FILE, DAMAGED_METRICS_FILE, CHOICES_FILE, CONFIG_FILE, "report.html")


class RunFolder:
    """The folder of a run, as long as this process holds it; see `hold_run_folder`.

    Attributes:
        path: the folder.
        run: id of the run in it; None if it holds none, or one whose `run.json` is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        self.run: str | None = None
        self._replaced: list[str] = []
        try:
            facts = json.loads((path / RUN_FILE).read_text())
            self.run, self._replaced = str(facts["id"]), [str(name) for name in facts["replaced"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s cannot be read (%s); the checkpoints say whose they are", path / RUN_FILE, error)

    @property
    def entries(self) -> list[Path]:
        """What the run has written so far."""
        found = [path for _, path in sorted(checkpoints(self.path))]
        return found + [path for name in _FILES if (path := self.path / name).exists()]

    def refuse_old_run(self) -> None:
        """Two runs never share a folder: one that holds a run is resumed or, on request, overwritten.

        Raises:
            UserError: it holds a run.
        """
        if self.entries:
            raise UserError(
                f"--output_dir {self.path} holds a run: resume it with --resume auto, start over with --overwrite "
                "true, or choose another folder"
            )

    def check_owner(self, checkpoint: Path, run: str, *, overwrite: bool) -> None:
        """Refuse a checkpoint of another run than the one in this folder.

        Raises:
            UserError: it names both runs.
        """
        if self.run in (None, run) or overwrite:
            return
        raise UserError(
            f"--resume: {checkpoint} belongs to run {run}, but {self.path} holds run {self.run}: choose another "
            f"--output_dir, or start over with --overwrite true and without --resume"
        )

    def begin(self, run: str | None) -> str | None:
        """Make the folder that of the run `run`, or of a new one.

        What another run left is set aside; so is a finished run that has no checkpoint to resume from.

        Returns:
            What was set aside, as a sentence; None if nothing was.

        Raises:
            WriteError: the folder or the one next to it cannot be written; nothing of the old run is lost.
        """
        is_foreign = run is not None and self.run is not None and run != self.run
        is_finished = run is None and (self.path / FINAL_FOLDER).exists()
        if is_foreign or is_finished:
            return self.set_aside(run)
        if run is None or run != self.run:
            self.run = run or _new_id()
            self._record()
        return None

    def set_aside(self, run: str | None = None) -> str | None:
        """Move everything that a run wrote to a folder next to this one, which then belongs to `run` or a new run.

        Returns:
            What was set aside, as a sentence; None if nothing was there.

        Raises:
            WriteError: as for `begin`.
        """
        if not (entries := self.entries):
            return None
        old, self.run = self.run, run or _new_id()
        aside = self.path.resolve().with_name(f"{self.path.resolve().name}.replaced-by-{self.run}")
        self._replaced.append(aside.name)
        # First of all: a process that dies from here on leaves a folder of the new run, with files of the old one.
        self._record()
        with write_errors(aside):
            aside.mkdir()
            if old is not None:
                write_file_atomically(aside / RUN_FILE, json.dumps({"id": old, "replaced": []}) + "\n")
            for entry in entries:
                entry.rename(aside / entry.name)
        return f"set aside the old run as {aside}; it is removed when this run has finished"

    def finish(self) -> None:
        """Remove what this run replaced."""
        for name in self._replaced:
            aside = self.path.resolve().with_name(name)
            if ".replaced-by-" in name and aside.is_dir():
                shutil.rmtree(aside)
        if self._replaced:
            self._replaced = []
            self._record()

    def _record(self) -> None:
        text = json.dumps({"id": self.run, "replaced": self._replaced}) + "\n"
        write_file_atomically(self.path / RUN_FILE, text)


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


@contextmanager
def hold_run_folder(path: Path) -> Iterator[RunFolder]:
    """Make the folder if it is missing, and let no other process use it as the folder of a run.

    Raises:
        UserError: another process holds it.
        WriteError: it cannot be written.
    """
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        with hold(path / _LOCK_FILE, f"--output_dir {path}"):
            yield RunFolder(path)
    finally:
        if not any(path.iterdir()):  # stopped before the run began
            path.rmdir()
