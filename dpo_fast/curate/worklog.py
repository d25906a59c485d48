"""Work that goes on where it was: results are appended to `OUT.partial` as they come; the file goes when all is done.

The first line holds a fingerprint of the settings and the input, every other one a key and its result. A line that a
crash cut is dropped; a log of other settings is never mixed in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from dpo_fast.errors import UserError


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits of anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


class WorkLog:
    """Results by key, in memory and in the log."""

    def __init__(self, out: Path, fingerprint: str, *, overwrite: bool) -> None:
        """Open the log beside `out`.

        Raises:
            UserError: it belongs to other settings or other input, or the folder cannot be written to.
        """
        self.path = out.with_name(out.name + ".partial")
        self.results: dict[str, Any] = {}
        header, kept = {"fingerprint": fingerprint}, 0
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                found, kept = self._read()
                # A kill before the header was written has left a log that holds nothing.
                if found not in (header, None) and not overwrite:
                    raise UserError(
                        f"{self.path} was left by an interrupted run with other settings or other rows: give those "
                        "settings to go on with it, or start anew by --overwrite true"
                    )
                if found != header:
                    self.results, kept = {}, 0
            self._file = self.path.open("r+b" if kept else "wb")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error
        self._file.seek(kept)
        self._file.truncate()
        if not kept:
            self._append(header)

    def _read(self) -> tuple[Any, int]:
        """The header, and the length of the whole lines; fills `results`."""
        header, length = None, 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            if header is None:
                header = record
            else:
                self.results[record["key"]] = record["result"]
            length += len(line)
        return header, length

    def _append(self, *records: Any) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, results: dict[str, Any]) -> None:
        """Keep results; they survive a kill from here on."""
        self._append(*({"key": key, "result": result} for key, result in results.items()))
        self.results |= results

    def finish(self) -> None:
        """Remove the log: what it held is in `out` by now."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> WorkLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
