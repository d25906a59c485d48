"""The SQLite file of reference log-probs.

WAL mode: atomic, safe against kill -9, several processes at once, no server. Each value has a checksum, so that a
damaged one counts as missing. docs/reference_store.md has the layout of the file and what was measured.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from dpo_fast.errors import UserError, WriteError
from dpo_fast.files import space

logger = logging.getLogger("dpo_fast")


def checksum(key: bytes, blob: bytes) -> int:
    """xxh3_64 of a key and its value, as SQLite's signed integers hold it."""
    return xxhash.xxh3_64_intdigest(key + blob) - 2**63


class ReferenceStore:
    """The SQLite file: one table from 16-byte keys to little-endian fp32 blobs and their checksums.

    Attributes:
        path: the file.
        damaged: keys whose values were found damaged; they count as missing.
    """

    # Written into the file's header: whose it is ("dpof"), and the version of its layout.
    APPLICATION_ID = 0x64706F66
    SCHEMA = 3
    # Its values had no checksums, so none of them can be trusted.
    _SCHEMA_WITHOUT_CHECKSUMS = 2
    # Below the limit on variables in a statement of the oldest SQLite in use (999).
    _KEYS_PER_QUERY = 500

    def __init__(self, path: Path, *, busy_timeout: float = 60.0) -> None:
        """Open or make the file.

        Args:
            path: its folder is made if it is missing.
            busy_timeout: seconds to wait for another process that is writing.

        Raises:
            UserError: not a store of this version, damaged, or a place that cannot be written.
        """
        self.path = path
        self.damaged: set[bytes] = set()
        self._busy_timeout = busy_timeout
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the reference store {path} cannot be made ({error}): name another file with --reference_store"
            ) from error
        with self._explained():
            # Without an isolation level Python leaves transactions to us: its own would not cover `create table`.
            self._connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        with self._connection:
            execute("begin")  # one snapshot: another process may be making the file right now
            application, version, tables = (
                execute(query).fetchone()[0]
                for query in ("pragma application_id", "pragma user_version", "select count(*) from sqlite_master")
            )
        is_empty = not (application or version or tables)
        if not is_empty and application != self.APPLICATION_ID:
            raise UserError(
                f"{self.path} is a SQLite file, but not a reference store of this version: "
                "name another file with --reference_store"
            )
        is_old = not is_empty and version == self._SCHEMA_WITHOUT_CHECKSUMS
        if not is_empty and not is_old and version != self.SCHEMA:
            raise UserError(
                f"{self.path} is a reference store of schema {version}, expected {self.SCHEMA}: remove it (the scores "
                "are recomputed) or name another file with --reference_store"
            )
        self._write_ahead()
        # A commit survives the death of the process; the last ones may be lost with the power, and are scored again.
        execute("pragma synchronous = normal")
        # `put` leaves a value that is whole.
        self._connection.create_function("is_whole", 3, self._is_whole, deterministic=True)
        if is_old:
            logger.warning(
                "%s was written by an earlier version, without checksums: its scores are recomputed", self.path
            )
        if is_empty or is_old:
            with self._connection:
                execute("begin immediate")
                if is_old:
                    execute("drop table if exists answers")
                # A plain table, not `without rowid`: keys are random, so only the small index is written all over.
                execute(
                    "create table if not exists answers "
                    "(key blob primary key not null, logps blob not null, checksum integer not null)"
                )
                execute(f"pragma application_id = {self.APPLICATION_ID}")
                execute(f"pragma user_version = {self.SCHEMA}")

    def _write_ahead(self) -> None:
        """Switch to WAL mode. SQLite lets no process wait that switches a new file while another one does."""
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                self._connection.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @staticmethod
    def _is_whole(key: object, blob: object, found: object) -> bool:
        """Whether a row is as it was put; damage can change the type of a column, too."""
        return isinstance(key, bytes) and isinstance(blob, bytes) and found == checksum(key, blob)

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was put stays."""
        self._connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The stored fp32 log-probs of those keys that are there and whole."""
        found: dict[bytes, np.ndarray] = {}
        with self._explained():
            for start in range(0, len(keys), self._KEYS_PER_QUERY):
                part = keys[start : start + self._KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                for key, blob, expected in self._connection.execute(
                    f"select key, logps, checksum from answers where key in ({marks})", part
                ):
                    if self._is_whole(key, blob, expected):
                        found[key] = np.frombuffer(blob, dtype="<f4")
                    elif isinstance(key, bytes):
                        self.damaged.add(key)
        return found

    def put(self, items: Mapping[bytes, np.ndarray]) -> None:
        """Store all items or none.

        A value that is there already stays, so that a resumed run reads the very numbers it began with, whoever scored
        the row again meanwhile; only a damaged one, or one of another length, is replaced.

        Raises:
            UserError: the file cannot be used; what was put before stays.
            WriteError: there is no room for it; what was put before stays.
        """
        assert all(np.isfinite(logps).all() for logps in items.values()), "only finite log-probs are stored"
        blobs = [(key, np.ascontiguousarray(logps, dtype="<f4").tobytes()) for key, logps in items.items()]
        rows = [(key, blob, checksum(key, blob)) for key, blob in blobs]
        with self._explained(), self._connection:
            self._connection.execute("begin immediate")
            self._connection.executemany(
                "insert into answers (key, logps, checksum) values (?, ?, ?) on conflict (key) do update "
                "set logps = excluded.logps, checksum = excluded.checksum "
                "where length(logps) <> length(excluded.logps) or not is_whole(key, logps, checksum)",
                rows,
            )
        self.damaged.difference_update(items)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into messages with a cure."""
        cures = {
            sqlite3.SQLITE_NOTADB: "it is not a SQLite file",
            sqlite3.SQLITE_CORRUPT: "it is damaged; remove it with its -wal and -shm files (the scores are recomputed)",
            sqlite3.SQLITE_READONLY: "make the file and its folder writable",
            sqlite3.SQLITE_CANTOPEN: "make the file and its folder writable",
            sqlite3.SQLITE_FULL: "free disk space and run again (nothing stored is lost)",
            sqlite3.SQLITE_IOERR: "free disk space or repair the disk and run again (nothing stored is lost)",
            sqlite3.SQLITE_BUSY: f"another process has been writing it for {self._busy_timeout:g} s; end that one",
        }
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of a damaged name in SQLite's own messages
            other = 0 if isinstance(error, sqlite3.Error) else sqlite3.SQLITE_CORRUPT
            code = getattr(error, "sqlite_errorcode", other) & 0xFF  # the low byte is the kind of error
            cure = cures.get(code, "it cannot be used")
            is_write = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
            room = f"; {space(self.path)}" if is_write else ""
            raise (WriteError if is_write else UserError)(
                f"the reference store {self.path} failed ({error}{room}): {cure}, or name another file with "
                "--reference_store"
            ) from error
