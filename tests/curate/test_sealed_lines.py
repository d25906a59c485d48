"""Every single bit of a small log flipped, one after another."""

import pytest
import xxhash

from dpo_fast.curate.sealed_lines import read_lines, seal, unseal

RECORDS = [
    {"key": "0", "result": 'a"}\n{"b'},
    {"key": "1", "result": [None, "\ud800", 1e300]},
    {"key": "2", "result": {}},
]


def read(content):
    return read_lines(content, lambda line: unseal(line, 7))


def test_a_line_is_json_with_the_hash_of_what_comes_before_it():
    line = seal({"key": "3", "result": "ä"}, 7)
    body = b'{"key": "3", "result": "\\u00e4"'
    assert line == body + b', "xxh3": "' + xxhash.xxh3_64_hexdigest(body, 7).encode() + b'"}\n'
    assert unseal(line[:-1], 7) == {"key": "3", "result": "ä"}
    assert unseal(line[:-1], 8) is None


def test_any_flipped_bit_costs_one_line_at_most():
    content = b"".join(seal(record, 7) for record in RECORDS)
    assert read(content) == (RECORDS, [])
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        records, damaged = read(bytes(changed))
        assert all(record in RECORDS for record in records)
        # A flipped line break costs nothing; a flip that makes one leaves two parts of a line.
        assert len(records) >= len(RECORDS) - 1
        assert len(records) + (len(damaged) > 0) == len(RECORDS)
        assert len(damaged) <= 2


@pytest.mark.parametrize(
    "line",
    [
        *(b"[]", b"1", b"null", b'""', b"{", b"\xff\xfe", b"\0" * 100, b"{}", b"[" * 100_000, b"9" * 10_000),
        *(b'{"key": "0", "result": 1}', b'{"key": "0", "result": 1, "xxh3": "0123456789abcdef"}'),
        pytest.param(b"x" * 100_000_000, id="100 MB"),
    ],
)
def test_lines_of_any_kind_are_set_aside(line):
    content = seal(RECORDS[0], 7) + line + b"\n" + seal(RECORDS[1], 7)
    assert read(content) == (RECORDS[:2], [line])


def test_carriage_returns_and_missing_line_breaks_cost_nothing():
    content = b"".join(seal(record, 7) for record in RECORDS)
    for changed in (content.replace(b"\n", b"\r\n"), content[:-1], content[:-1] + b"\x8a"):
        records, damaged = read(changed)
        assert records == RECORDS
        assert damaged == []
