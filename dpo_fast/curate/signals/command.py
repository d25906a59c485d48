"""`command:PROGRAM ARG...`: a program of the user's judges one answer, within limits.

It runs in a fresh scratch folder and a new session. The kernel limits each process in memory, processor time and file
size; what all processes use together (memory, files, their number) is polled every few hundredths of a second.
RLIMIT_NPROC does not help: it limits nothing for root, and for other users it counts everything that they run. The
program can still reach the network, files elsewhere and other processes of the same user.

The kernel's memory limit is RLIMIT_DATA at 1.5 times the setting: RLIMIT_AS would stop programs that reserve address
space without touching it (node, Java).
"""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dpo_fast.config import SignalConfig
from dpo_fast.curate.identity import command_identity
from dpo_fast.curate.sandbox.output import Output
from dpo_fast.curate.sandbox.processes import (
    descendants,
    end_descendants,
    have_children_ended,
    peak_memory,
    remove_tree,
    wait_until,
)
from dpo_fast.curate.signals.declare import TMPDIR_CURE, Limits, bad_spec, text_signal
from dpo_fast.curate.verdict import TextSignal, Unjudged
from dpo_fast.errors import UserError
from dpo_fast.files import write_errors

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

_MIB = 2**20
_FIRST_LOOK, _LOOK_EVERY = 0.02, 0.05
# How long children may outlive the program, such as the other end of a pipe.
_STRAGGLERS = 0.25
# The program may run code from an answer, which must not see the user's keys and tokens.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")


# It stops the program at `--timeout` itself and then needs a moment to clean up.
@text_signal("command:PROGRAM ARG...", limits=Limits(timeout_grace=2.0), is_slow=True, identity=command_identity)
def command(argument: str, config: SignalConfig) -> TextSignal:
    """A checker; call it only in a process without other children, such as `workers.worker`.

    Raises:
        UserError: commands are not allowed, or there is no such program.
    """
    spec = f"--signals command:{argument}"
    if not config.allow_commands:
        raise UserError(f"{spec}: runs a program on each answer; allow it with --allow_commands true")
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise UserError(f"{spec}: cannot be split into words: {error}") from error
    if not words:
        raise bad_spec(f"command:{argument}", "command:PROGRAM ARG...")
    program = shutil.which(words[0])
    if program is None:
        raise UserError(f"{spec}: no program {words[0]!r} found; write ./{words[0]} for one in this folder")
    # The program runs in another folder, where names of files in this one must work too.
    arguments = [os.path.abspath(word) if os.path.isfile(word) else word for word in words[1:]]
    return _Checker([os.path.abspath(program), *arguments], config)


class _Checker:
    def __init__(self, argv: list[str], config: SignalConfig) -> None:
        self.argv = argv
        self.config = config

    def __call__(self, answer: str, row: Row) -> float:
        with _scratch_errors():
            # Without symlinks: `end_those_in` finds what was started here by this path.
            folder = Path(tempfile.mkdtemp(prefix="command-")).resolve()
        try:
            with _scratch_errors():
                (folder / "answer.txt").write_bytes(answer.encode(errors="replace"))
                (folder / "row.json").write_text(json.dumps(row, default=str), encoding="ascii")
            return _Run(self.argv, self.config, folder).score()
        finally:
            if not have_children_ended()[0]:
                end_descendants(os.getpid())
            remove_tree(folder)


def _scratch_errors() -> AbstractContextManager[None]:
    return write_errors(Path(tempfile.gettempdir()), cure=TMPDIR_CURE)


class _Run:
    """The run on one answer."""

    def __init__(self, argv: list[str], config: SignalConfig, folder: Path) -> None:
        self.argv = argv
        self.config = config
        self.folder = folder
        self.memory = 0
        self.memory_limit = config.memory_limit_mib * _MIB
        self.inputs = folder_size(folder)

    def score(self) -> float:
        """Run the program to its end and read its score; `_Checker` cleans up whatever happens."""
        own_memory = psutil.Process().memory_info().rss
        with self._start() as process, Output(process, self.config.output_limit_kib * 1024) as output:
            status = self._watch(process.pid, output)
            everyone_ended = wait_until(self._collect, time.monotonic() + _STRAGGLERS)
            output.drain()
        self._check_files()
        # A program's peak begins with the memory of the process that was forked for it.
        if self.memory > max(self.memory_limit, own_memory):
            self._over_memory()
        if not everyone_ended:
            raise Unjudged("left processes running when it ended")
        if status < 0:
            raise Unjudged(f"ended by signal {-status} ({signal.strsignal(-status)})")
        return _read_score(output.last_line(), status)

    def _watch(self, pid: int, output: Output) -> int:
        """Wait for the program within its limits; returns its exit status, negative for a signal."""
        deadline = time.monotonic() + self.config.timeout
        next_look = time.monotonic() + _FIRST_LOOK
        while True:
            output.read(max(0.0, min(next_look, deadline) - time.monotonic()))
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                self.memory = peak_memory(usage.ru_maxrss)
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if now >= deadline:
                raise Unjudged(f"took longer than {self.config.timeout:g} s")
            if now >= next_look:
                self._check_processes()
                self._check_files()
                next_look = time.monotonic() + _LOOK_EVERY

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with (self.folder / "answer.txt").open("rb") as answer:
            try:
                process = subprocess.Popen(
                    self.argv,
                    cwd=self.folder,
                    env=environment | {"HOME": str(self.folder), "TMPDIR": str(self.folder)},
                    stdin=answer,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                    preexec_fn=self._limit,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise Unjudged(f"cannot be started: {error}") from error
        # Reaped by wait4, which reports the memory used, so Popen must not wait for it.
        process.returncode = 0
        return process

    def _limit(self) -> None:
        """Set the kernel's limits on each process; called in the child, before the program starts."""
        for limit, value in (
            (resource.RLIMIT_DATA, self.memory_limit * 3 // 2),
            (resource.RLIMIT_FSIZE, self.config.file_limit_mib * _MIB),
            (resource.RLIMIT_CPU, math.ceil(self.config.timeout) + 1),
            (resource.RLIMIT_CORE, 0),
        ):
            highest = resource.getrlimit(limit)[1]
            value = value if highest == resource.RLIM_INFINITY else min(value, highest)
            resource.setrlimit(limit, (value, value))
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _collect(self) -> bool:
        ended, memory = have_children_ended()
        self.memory = max(self.memory, memory)
        return ended

    def _check_processes(self) -> None:
        processes = descendants(os.getpid())
        if len(processes) > self.config.process_limit:
            raise Unjudged(f"ran more than {self.config.process_limit} processes at once")
        # The second measure counts shared pages once, but is slow.
        if _memory_of(processes, "rss") > self.memory_limit and _memory_of(processes, "pss") > self.memory_limit:
            self._over_memory()

    def _over_memory(self) -> None:
        raise Unjudged(f"used more than {self.config.memory_limit_mib} MiB of memory")

    def _check_files(self) -> None:
        limit = self.config.file_limit_mib * _MIB
        # The kernel stops a single file exactly at the limit.
        if folder_size(self.folder, enough=self.inputs + limit) >= self.inputs + limit:
            raise Unjudged(f"wrote more than {self.config.file_limit_mib} MiB of files")


def _memory_of(processes: list[psutil.Process], kind: str) -> int:
    """Bytes that processes hold together; `pss` if the system reports it, else `rss`."""
    total = 0
    for process in processes:
        try:
            found = process.memory_full_info() if kind == "pss" else process.memory_info()
            total += getattr(found, kind, found.rss)
        except psutil.Error:
            continue
    return total


def folder_size(folder: Path, enough: float = math.inf) -> float:
    """Bytes of all files below a folder, at least one disk block each; stops counting at `enough`.

    A folder nested so deeply that no path reaches into it counts as infinitely large.
    """
    total, folders = 0.0, [str(folder)]
    while folders and total < enough:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    total += max(status.st_size, status.st_blocks * 512, 4096)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed since it was listed
            continue
        except OSError:
            return math.inf
    return total


def _read_score(line: str, status: int) -> float:
    """The number in the program's last line if there is one, else whether it succeeded."""
    try:
        return float(line)
    except ValueError:
        return float(status == 0)
