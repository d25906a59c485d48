"""Killing whole trees of processes, even if they hide, hang, fork or ignore signals.

On Linux a process can adopt the orphans among its descendants (as a subreaper), so a child that detached itself is
still found below it. Elsewhere only processes that are still in the tree are found.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36
_PATIENCE = 5.0


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Get SIGTERM when process `parent`, which started this one, dies; exit at once if it is dead already."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[psutil.Process]:
    """The processes below `pid` that are still running."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_descendants(pid: int) -> None:
    """Kill everything below `pid` until nothing is left; gives up after a few seconds."""
    deadline = time.monotonic() + _PATIENCE
    while (found := descendants(pid)) and time.monotonic() < deadline:
        # A stopped process cannot fork while the others are being found.
        stopped: set[psutil.Process] = set()
        while (fresh := set(found) - stopped) and time.monotonic() < deadline:
            _signal_all(fresh, signal.SIGSTOP)
            stopped |= fresh
            found = descendants(pid)
        _signal_all(stopped, signal.SIGKILL)
        if pid == os.getpid():
            wait_until(lambda: have_children_ended()[0], deadline)
        else:
            wait_until(partial(_have_ended, stopped), deadline)


def _have_ended(processes: set[psutil.Process]) -> bool:
    return not any(map(_is_running, processes))


def _signal_all(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a child of this process and everything below it."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        end_descendants(process.pid)
        process.kill()
    process.wait()


def end_those_in(folder: Path) -> None:
    """Kill processes whose TMPDIR is in `folder` and that have dropped out of the tree."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TMPDIR", "").startswith(f"{folder}{os.sep}"):
                process.kill()
        except psutil.Error:
            continue


def have_children_ended() -> tuple[bool, int]:
    """Reap children that ended; returns whether none is left, and the highest peak memory among them in bytes."""
    memory = 0
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return True, memory
        if not pid:
            return False, memory
        memory = max(memory, peak_memory(usage.ru_maxrss))


def peak_memory(maxrss: int) -> int:
    """`ru_maxrss` in bytes: Linux counts KiB, macOS bytes."""
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def wait_until(is_done: Callable[[], bool], deadline: float) -> bool:
    """Poll `is_done` every few milliseconds until the deadline (of `time.monotonic`); returns its last reply."""
    while not (done := is_done()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return done


def remove_tree(folder: Path) -> None:
    """Remove a folder, even one made hard to remove."""
    try:
        shutil.rmtree(folder)
    # Permissions are missing, or it is nested more deeply than rmtree or the length of a path can follow.
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL, check=False)
