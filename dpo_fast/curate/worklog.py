"""Work that resumes where it stopped: results are appended to `OUT.partial` as they come, until `OUT` is complete.

Each process that opens the log writes a line with what the results depend on (settings, rows, models); every other line
is a key with its result. Lines are sealed with checksums: a damaged line, or one that a crash cut short, is set aside
and counted, and only its result is lost. Nothing in the log is ever changed or removed; results of other settings are
never mixed in. Only a process that holds the output (`rows.hold_output`) may open the log.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from dpo_fast.curate.sealed_lines import Record, read_lines, seal, unseal
from dpo_fast.errors import UserError
from dpo_fast.files import write_errors

logger = logging.getLogger("dpo_fast")

# Lines by which a process opens a log can be read without knowing what the log belongs to.
_OPENING_SEED = 0


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits identifying anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def log_path(out: Path) -> Path:
    """Where the log of the file `out` lies."""
    return Path(f"{out}.partial")


def damaged_path(out: Path) -> Path:
    """Where damaged lines of the log of the file `out` are copied to."""
    return Path(f"{out}.partial.damaged")


class WorkLog:
    """Results by key, in memory and on disk.

    Attributes:
        path: the file.
        results: by key, the one added last at the end.
        num_damaged: lines that could not be read.
    """

    def __init__(
        self,
        out: Path,
        depends_on: Mapping[str, Any],
        *,
        overwrite: bool,
        is_valid: Callable[[str, Any], bool] = lambda key, result: True,
    ) -> None:
        """Open the log of `out`.

        Args:
            out: the file that the results are for; its folder exists.
            depends_on: what the results depend on, by the name that messages use; anything that JSON can hold.
            overwrite: discard a log that belongs to something else.
            is_valid: whether a result under a key can be used; asked of lines without a checksum, which earlier
                versions wrote.

        Raises:
            UserError: it belongs to something else.
            WriteError: it cannot be written to.
        """
        self.path = log_path(out)
        self.results: dict[str, Any] = {}
        self.num_damaged = 0
        self._out = out
        self._identity = {name: fingerprint(part) for name, part in depends_on.items()}
        self._seed = xxhash.xxh3_64_intdigest(json.dumps(self._identity).encode())
        self._unsealed_header = {"fingerprint": fingerprint(*depends_on.values())}
        self._is_valid = is_valid
        with write_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._load(overwrite=overwrite)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _load(self, *, overwrite: bool) -> None:
        """Take the results of an interrupted run that depended on the same things, or start over."""
        content = self.path.read_bytes()
        opening = seal({"opened": self._identity}, _OPENING_SEED)
        records, damaged = read_lines(content, self._parser(content))
        # A kill while the first line was written leaves a log that holds nothing.
        is_new = b"\n" not in content and len(content) < len(opening)
        if not is_new and (reason := self._refusal(records)):
            if not overwrite:
                raise UserError(f"{self.path} {reason}, or discard it with --overwrite true")
            is_new = True
        if is_new:
            os.ftruncate(self._descriptor, 0)
            content, records, damaged = b"", [], []
        for record in records:
            if "key" in record:
                self._put(record["key"], record["result"])
        self._set_aside(damaged)
        self._end = len(content)
        self._append((b"\n" if content and not content.endswith(b"\n") else b"") + opening)

    def _parser(self, content: bytes) -> Callable[[bytes], Record | None]:
        is_unsealed = _parse_json(content.partition(b"\n")[0]) == self._unsealed_header

        def parse(line: bytes) -> Record | None:
            record = _parse_opening(line) or unseal(line, self._seed)
            if record is None and is_unsealed:
                record = _parse_json(line)
                if record == self._unsealed_header:
                    return {"opened": self._identity}
                if record is not None and not self._is_unsealed_record(record):
                    return None
            return record

        return parse

    def _is_unsealed_record(self, record: Record) -> bool:
        if record.keys() == {"pid"}:
            return True
        is_result = record.keys() == {"key", "result"} and isinstance(record["key"], str)
        return is_result and self._is_valid(record["key"], record["result"])

    def _refusal(self, records: list[Record]) -> str | None:
        """Why the log cannot be resumed, with the cure; None if it can."""
        openings = [record["opened"] for record in records if "opened" in record]
        other = next((opened for opened in openings if opened != self._identity), None)
        if other is not None:
            names = [name for name in {**self._identity, **other} if self._identity.get(name) != other.get(name)]
            changed = " and other ".join(names)
            return f"was left by an interrupted run with other {changed}: rerun with those to resume it"
        if not records:
            return (
                "was left by an earlier version, with other settings or other rows, or its first lines are damaged: "
                "rerun with the version, settings and rows that wrote it, restore it from a copy"
            )
        return None

    def _put(self, key: str, result: Any) -> None:
        self.results.pop(key, None)
        self.results[key] = result

    def _set_aside(self, damaged: list[bytes]) -> None:
        """Copy damaged lines to a file of their own, since the log is removed once the work is complete."""
        self.num_damaged = len(damaged)
        if not damaged:
            return
        path = damaged_path(self._out)
        with write_errors(path):
            path.write_bytes(b"".join(line + b"\n" for line in damaged))
        logger.warning(
            "%s: damaged lines are set aside in %s (%d), and what they held is done again; "
            "all other results are kept (%d)",
            *(self.path, path, len(damaged), len(self.results)),
        )

    def _append(self, lines: bytes) -> None:
        """Write lines to the disk, all or none."""
        cure = "then rerun the same command to resume; all results up to here are kept"
        with write_errors(self.path, needed=len(lines), cure=cure):
            try:
                written = 0
                while written < len(lines):
                    written += os.pwrite(self._descriptor, lines[written:], self._end + written)
                os.fsync(self._descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._end)
                raise
        self._end += len(lines)

    def add(self, results: dict[str, Any], *, copies: int = 1) -> None:
        """Keep results; from here on they survive a kill.

        Args:
            results: by key.
            copies: lines to write for each of them.

        Raises:
            WriteError: they could not be written and are not kept.
        """
        lines = [seal({"key": key, "result": result}, self._seed) for key, result in results.items()]
        self._append(b"".join(line * copies for line in lines))
        for key, result in results.items():
            self._put(key, result)

    def finish(self) -> None:
        """Remove the log: its contents are in `out` by now."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> WorkLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _parse_opening(line: bytes) -> Record | None:
    return unseal(line, _OPENING_SEED)


def _parse_json(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
