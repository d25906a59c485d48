"""The folder of a demo: the names in it, and clearing it for another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError

MARKER = ".dpo-fast-demo"
STORE = "reference.sqlite"
OUTPUTS = (
    *("base", "prompts.jsonl", "held_out_prompts.jsonl", "samples.jsonl", "labelled.jsonl", "pairs.jsonl"),
    *("held_out_pairs.jsonl", STORE, f"{STORE}-shm", f"{STORE}-wal", "run", "inspect.html", "plot.png", "summary.json"),
    *(f"{name}.{kind}" for name in ("eval", "eval_greedy") for kind in ("json", "answers.jsonl")),
)


def prepare_folder(out: Path) -> None:
    """Make `out`, or remove what an earlier demo left in it; files that no demo wrote are never touched.

    Raises:
        UserError: `out` is a file, holds files that no demo wrote, or cannot be written to.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = sorted(names - {MARKER, *OUTPUTS}) if MARKER in names else sorted(names)
    if foreign:
        raise UserError(f"--out {out}: holds {foreign[0]!r}, which no demo wrote; choose a new or an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error
    for name in names - {MARKER}:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
