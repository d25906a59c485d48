"""The log that interrupted work resumes from."""

import json
import os
import subprocess
import sys

import pytest

from dpo_fast.curate.worklog import WorkLog, fingerprint
from dpo_fast.errors import UserError


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    out, key = tmp_path / "new" / "out.jsonl", fingerprint({"a": 1}, ["rows"])
    with WorkLog(out, key, overwrite=False) as log:
        log.add({"0": "first", "1": {"text": "zwei\u2028\r"}})
        log.add({"2": 3})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-5])
    with WorkLog(out, key, overwrite=False) as log:
        assert log.results == {"0": "first", "1": {"text": "zwei\u2028\r"}}
        log.add({"2": 4})
    with WorkLog(out, key, overwrite=False) as log:
        assert log.results["2"] == 4
        log.finish()
    assert not log.path.exists()


def test_a_log_of_other_settings_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out.jsonl"
    with WorkLog(out, fingerprint(1), overwrite=False) as log:
        log.add({"0": "old"})
    with pytest.raises(UserError, match="other settings or other rows"):
        WorkLog(out, fingerprint(2), overwrite=False)
    with WorkLog(out, fingerprint(2), overwrite=True) as log:
        assert log.results == {}
        log.add({"0": "new"})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"fingerprint": fingerprint(2)},
        {"pid": os.getpid()},
        {"key": "0", "result": "new"},
    ]


@pytest.mark.parametrize("left", [b"", b'{"fingerp'])
def test_a_log_cut_within_its_first_line_starts_over(tmp_path, left):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_bytes(left)
    with WorkLog(out, fingerprint(1), overwrite=False) as log:
        log.add({"0": "x"})
    with WorkLog(out, fingerprint(1), overwrite=False) as log:
        assert log.results == {"0": "x"}


HOLDER = """
import sys
from pathlib import Path
from dpo_fast.curate.worklog import WorkLog
with WorkLog(Path(sys.argv[1]), "key", overwrite=False) as log:
    log.add({"0": "held"})
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path):
    out = tmp_path / "out.jsonl"
    with WorkLog(out, "key", overwrite=False):
        pass  # whose process is not the one to be named
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"out\.jsonl\.partial is in use by process {holder.pid}: wait"):
                WorkLog(out, "key", overwrite=overwrite)
        holder.kill()
    # The kernel drops the lock of a process that was killed, and what it added is kept.
    with WorkLog(out, "key", overwrite=False) as log:
        assert log.results == {"0": "held"}


def test_a_refused_log_is_let_go(tmp_path):
    out = tmp_path / "out.jsonl"
    with WorkLog(out, "one", overwrite=False):
        pass
    with pytest.raises(UserError, match="other settings"):
        WorkLog(out, "two", overwrite=False)
    with WorkLog(out, "one", overwrite=False):
        pass


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/out\.jsonl: cannot be written to"):
        WorkLog(tmp_path / "file" / "out.jsonl", "key", overwrite=False)
