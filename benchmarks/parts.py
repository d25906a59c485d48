"""Shared by benchmarks in parts: processes with a time limit, earlier results, and facts about card and source."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LINES_SHOWN = 15
# Time for a terminated process to end its own children and remove its files.
GRACE_SECONDS = 5

_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


def run_limited(
    command: Sequence[str], limit: float, env: Mapping[str, str] | None = None
) -> tuple[str | None, list[str]]:
    """Run a command in its own process group, which is killed when it exits or after `limit` seconds.

    Returns:
        What went wrong, or None; and the last lines of output.
    """
    if _stopping.is_set():
        return "stopped", []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("w") as stream:
            child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=env)
            _running.add(child)
            try:
                code: int | None = child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(child)
                _running.discard(child)
        lines = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
    if code == 0:
        return None, lines
    if code is None:
        return f"over its limit of {limit:.0f} s", lines
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}", lines


def _end(child: subprocess.Popen[bytes]) -> None:
    """Terminate it, so that it can end what it started in other groups; then kill its group."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def end_with_children() -> None:
    """From now on, when this process is terminated, it first ends what it runs by `run_limited`."""

    def stop(number: int, frame: object) -> None:
        _stopping.set()
        for child in list(_running):
            _end(child)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def earlier_results(path: Path) -> dict[str, Any]:
    """The results that `--resume` continues from; empty if there is no file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        sys.exit(f"--resume: cannot read {path} ({error}); leave out --resume, or choose another --out")
    if not isinstance(found, dict) or not isinstance(found.get("parts", {}), dict):
        sys.exit(f"--resume: {path} has no results; leave out --resume, or choose another --out")
    return found


def check_can_write(path: Path) -> None:
    """Exit before anything runs if the results cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        sys.exit(f"--out {path}: cannot write: {error.strerror}")
    if not path.stat().st_size:
        path.unlink()


def card() -> str:
    """The GPU, its memory and driver, without a CUDA context in this process."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        import torch

        return "unknown GPU (no nvidia-smi)" if torch.cuda.is_available() else "no GPU"


def source_digest() -> str:
    """A hash of the library's source, kernels included."""
    (root,) = importlib.util.find_spec("dpo_fast").submodule_search_locations  # type: ignore[union-attr]
    files = [
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)  # `kernels` is a link
        for name in names
        if name.endswith(".py")
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
