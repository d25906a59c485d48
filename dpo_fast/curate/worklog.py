"""Work that resumes where it stopped: results are appended to `OUT.partial` as they come, until `OUT` is whole.

The first line holds a fingerprint of the settings and the input; every other line is a key with its result, or the id
of a process that opened the log. A line cut short by a crash is dropped; results of other settings are never mixed in.
One process at a time holds the log, under a lock that the kernel drops when the process dies.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from dpo_fast.errors import UserError

logger = logging.getLogger("dpo_fast")


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits identifying anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def log_path(out: Path) -> Path:
    """Where the log of the file `out` lies."""
    return Path(f"{out}.partial")


class WorkLog:
    """Results by key, in memory and on disk."""

    def __init__(self, out: Path, fingerprint: str, *, overwrite: bool) -> None:
        """Open and lock the log of `out`.

        Raises:
            UserError: another process holds it, it belongs to other settings or other input, or the folder cannot be
                written to.
        """
        self.path = log_path(out)
        self.results: dict[str, Any] = {}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            # Neither truncates nor requires an existing file: nothing may change before the lock is held.
            self._file: BinaryIO = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error
        try:
            self._lock()
            self._load({"fingerprint": fingerprint}, overwrite=overwrite)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holders = [record["pid"] for record, _ in self._records() if "pid" in record]
            holder = f"process {holders[-1]}" if holders else "another process"
            raise UserError(f"{self.path} is in use by {holder}: wait for it to end, or stop it") from error
        except OSError as error:
            # Some network file systems have no locks; one process at a time is then up to the user.
            logger.debug("no lock on %s: %s", self.path, error)

    def _load(self, header: dict[str, str], *, overwrite: bool) -> None:
        """Take the results of an interrupted run with the same header, or start over."""
        records = list(self._records())
        # A kill before the header was written leaves a log that holds nothing.
        if records and records[0][0] != header:
            if not overwrite:
                raise UserError(
                    f"{self.path} was left by an interrupted run with other settings or other rows: rerun with those "
                    "settings to resume it, or discard it with --overwrite true"
                )
            records = []
        self.results = {record["key"]: record["result"] for record, _ in records if "key" in record}
        self._file.seek(records[-1][1] if records else 0)
        self._file.truncate()
        self._append(*([] if records else [header]), {"pid": os.getpid()})

    def _records(self) -> list[tuple[dict[str, Any], int]]:
        """The records of the whole lines, each with the position of its end."""
        self._file.seek(0)
        records, end = [], 0
        for line in self._file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            end += len(line)
            records.append((record, end))
        return records

    def _append(self, *records: Any) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, results: dict[str, Any]) -> None:
        """Keep results; from here on they survive a kill."""
        self._append(*({"key": key, "result": result} for key, result in results.items()))
        self.results |= results

    def finish(self) -> None:
        """Remove the log: its contents are in `out` by now."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> WorkLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
