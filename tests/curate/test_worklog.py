"""The log that interrupted work resumes from."""

import errno
import json
import os
import random

import log_attacks  # noqa: F401
import pytest
from attacks import ATTACKS

from dpo_fast.curate.worklog import WorkLog, damaged_path, fingerprint, log_path
from dpo_fast.errors import UserError, WriteError

DEPENDS_ON = {"settings": {"a": 1}, "rows": ["row"]}


def open_log(out, depends_on=DEPENDS_ON, *, overwrite=False):
    return WorkLog(out, depends_on, overwrite=overwrite)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "new").mkdir()
    return tmp_path / "new" / "out.jsonl"


def test_results_survive_and_the_last_one_of_a_key_counts(out):
    with open_log(out) as log:
        log.add({"0": "first", "1": {"text": "zwei\u2028\r"}})
        log.add({"0": None}, copies=2)
    with open_log(out) as log:
        assert list(log.results.items()) == [("1", {"text": "zwei\u2028\r"}), ("0", None)]
        assert log.num_damaged == 0
        log.finish()
    assert list(out.parent.iterdir()) == []


def test_a_line_cut_short_by_a_crash_is_set_aside(out):
    with open_log(out) as log:
        log.add({"0": "first"})
        log.add({"1": 2})
    log.path.write_bytes(cut := log.path.read_bytes()[:-5])
    with open_log(out) as log:
        assert log.results == {"0": "first"}
        assert log.num_damaged == 1
        log.add({"1": 3})
    with open_log(out) as log:
        assert log.results == {"0": "first", "1": 3}
    assert log.path.read_bytes().startswith(cut + b"\n")


def test_damaged_lines_are_named_counted_and_kept(out, caplog):
    with open_log(out) as log:
        log.add({str(number): number for number in range(5)})
    opening, *lines = log.path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"1", b"7", 1)
    lines[3] = b"\xff[]\n"
    log.path.write_bytes(damaged := b"".join([opening, *lines]))
    for _ in range(2):
        caplog.clear()
        with open_log(out) as log:
            assert log.results == {"0": 0, "2": 2, "4": 4}
            assert log.num_damaged == 2
        assert caplog.messages == [
            f"{log.path}: damaged lines are set aside in {out}.partial.damaged (2), and what they held is done again; "
            "all other results are kept (3)"
        ]
        assert damaged_path(out).read_bytes() == lines[1] + lines[3]
    assert log.path.read_bytes().startswith(damaged)
    with open_log(out) as log:
        log.finish()
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.partial.damaged"]


def test_a_damaged_first_line_costs_nothing(out):
    with open_log(out) as log:
        log.add({"0": 0})
    content = log.path.read_bytes()
    log.path.write_bytes(b"x" + content[1:])
    with open_log(out) as log:
        assert log.results == {"0": 0}
    log.path.write_bytes(b"x" + content[1:])
    with pytest.raises(UserError, match="its first lines are damaged: rerun with the version, settings and rows"):
        open_log(out, {"settings": 2})
    assert log.path.read_bytes() == b"x" + content[1:]


def test_a_log_of_something_else_is_refused_by_name_or_replaced(out):
    with open_log(out) as log:
        log.add({"0": "old"})
    for other, named in (
        ({"settings": 2, "rows": ["row"]}, "settings"),
        ({"settings": 2, "rows": []}, "settings and other rows"),
        ({"settings": {"a": 1}, "rows": ["row"], "model m": 1}, "model m"),
    ):
        with pytest.raises(UserError, match=f"left by an interrupted run with other {named}: rerun with those"):
            open_log(out, other)
    with open_log(out, {"settings": 2}, overwrite=True) as log:
        assert log.results == {}
        log.add({"0": "new"})
    opening, line = map(json.loads, log.path.read_text().splitlines())
    assert opening.keys() == {"opened", "xxh3"}
    assert (line["key"], line["result"]) == ("0", "new")


def of_an_earlier_version(*records):
    """Lines without checksums, as versions before 0.1.0 wrote them."""
    header = {"fingerprint": fingerprint(*DEPENDS_ON.values())}
    return "".join(json.dumps(record) + "\n" for record in [header, {"pid": 1}, *records]).encode()


def test_a_log_without_checksums_is_read(out):
    results = [{"key": "0", "result": 0}, {"key": "1", "result": 1}, {"key": "0", "result": 2}]
    bad = b'[]\n1\n{"key": 3, "result": 1}\n{"key": "4"}\n{"key": "bad", "result": 1}\n\xff\n'
    log_path(out).write_bytes(of_an_earlier_version(*results) + bad)
    for _ in range(2):
        with WorkLog(out, DEPENDS_ON, overwrite=False, is_valid=lambda key, result: key != "bad") as log:
            assert {key: log.results[key] for key in "01"} == {"0": 2, "1": 1}
            assert log.num_damaged == 6
            log.add({"sealed": 3})
    log_path(out).write_bytes(of_an_earlier_version(*results))
    with pytest.raises(UserError, match="left by an earlier version, with other settings"):
        open_log(out, {"settings": 2})


@pytest.mark.parametrize("left", [b"", b'{"opene'])
def test_a_log_cut_within_its_first_line_starts_over(out, left):
    log_path(out).write_bytes(left)
    with open_log(out) as log:
        log.add({"0": "x"})
    with open_log(out) as log:
        assert log.results == {"0": "x"}


@pytest.mark.parametrize("number", range(30))
@pytest.mark.parametrize("name", ["judgements", "a_log_of_sample", "a_log_of_label"])
def test_a_flipped_bit_changes_no_result(tmp_path, name, number):
    ATTACKS[f"flipped_bit_in_{name}"](random.Random(number), tmp_path)


def test_a_write_that_fails_leaves_whole_lines(out, monkeypatch):
    """The disk takes a part of a line, and a second time there is room again."""
    with open_log(out) as log:
        log.add({"0": 0})
        before = log.path.read_bytes()
        pwrite = os.pwrite

        def full(descriptor, data, offset):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(descriptor, data[: len(data) - 5], offset)

        with monkeypatch.context() as patch:
            patch.setattr("dpo_fast.curate.worklog.os.pwrite", full)
            with pytest.raises(WriteError, match=r"partial cannot be written: No space left .* rerun the same command"):
                log.add({"1": 1})
        assert log.path.read_bytes() == before
        assert "1" not in log.results
        log.add({"2": 2})
    with open_log(out) as log:
        assert log.results == {"0": 0, "2": 2}
        assert log.num_damaged == 0
