"""What benchmarks in parts share: a process with a time limit, what the card is, and which source runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

LINES_SHOWN = 15
# What a process that is told to end may take to end its own children and remove its files.
GRACE_SECONDS = 5


def run_limited(
    command: Sequence[str], limit: float, env: Mapping[str, str] | None = None
) -> tuple[str | None, list[str]]:
    """Run a command in a process group of its own, ended at the end or after `limit` seconds.

    Returns:
        What went wrong, or None; and the last lines of its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("w") as stream:
            child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=env)
            try:
                code: int | None = child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
                with suppress(subprocess.TimeoutExpired):
                    child.terminate()
                    child.wait(GRACE_SECONDS)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lines = log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
    if code == 0:
        return None, lines
    if code is None:
        return f"over its limit of {limit:.0f} s", lines
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}", lines


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
