"""Lines of JSON that carry a checksum: `{"key": "3", "result": 1, "xxh3": "89ab..."}`.

The checksum covers the line's bytes before it and is seeded, so that a line only verifies in the log it was written
to. A bit that flips anywhere in a line, or in the line break after it, costs that line and no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import xxhash

Record: TypeAlias = dict[str, Any]

_MARK = b', "xxh3": "'
# Where a line break was, if its byte was changed: JSON has no quote, brace, any byte, brace, quote within a line.
_SEAM = re.compile(rb'(?<="\}).(?=\{"|$)', re.DOTALL)


def seal(record: Record, seed: int) -> bytes:
    """A record with its checksum, as one line; at least one entry."""
    body = json.dumps(record).encode().removesuffix(b"}")
    return body + _MARK + _checksum(body, seed) + b"\n"


def unseal(line: bytes, seed: int) -> Record | None:
    """The record of a line without its line break; None if the line is damaged or belongs to another log."""
    body, mark, checksum = line.rpartition(_MARK)
    if not mark or checksum != _checksum(body, seed):
        return None
    record: Record = json.loads(body + b"}")
    return record


def read_lines(content: bytes, parse: Callable[[bytes], Record | None]) -> tuple[list[Record], list[bytes]]:
    """The records of a file, in order, and the lines or parts of lines that hold none."""
    records: list[Record] = []
    damaged: list[bytes] = []
    for line in content.split(b"\n"):
        found = parse(line)
        # Only a damaged line is searched: its line break may be what was damaged.
        for part in [line] if found is not None else _SEAM.split(line):
            record = found if found is not None else parse(part)
            if record is not None:
                records.append(record)
            elif part:
                damaged.append(part)
    return records, damaged


def _checksum(body: bytes, seed: int) -> bytes:
    return b'%016x"}' % xxhash.xxh3_64_intdigest(body, seed)
