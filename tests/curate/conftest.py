"""What tests of several signals and of the workers start from."""

import sys

import pytest

OWN = """
import os, signal, sys, time

def judge(answer, row):
    match answer:
        case "raise": raise ValueError("no such thing")
        case "exit": sys.exit(3)
        case "none": return None
        case "nan": return float("nan")
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "gone": os._exit(4)
        case "sleep": time.sleep(600)
        case "hold": sum(iter(lambda: 1, 2))
        case "deaf":
            while True:
                try: time.sleep(600)
                except BaseException: pass
        case "stuck": max(range(10**13))
        case "recurse": return judge(answer, row) + judge(answer, row)
        case "shout": raise ValueError("x\\ud800\\n" * 10**6)
    return len(answer) > row.get("limit", 0)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_signal_module.py").write_text(OWN)
    yield "python:own_signal_module:judge"
    sys.modules.pop("own_signal_module", None)
