"""The GPU benchmark as far as a CPU goes: parts run apart, a failing one is reported, passed ones are not run again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_check
import gpu_head
import parts

pytestmark = pytest.mark.slow


def run(out, *options):
    command = [sys.executable, gpu_check.__file__, "--tiny", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path):
    out = tmp_path / "check.json"
    done = run(out, "--only", "errors", "logprob", "--fail", "errors")
    assert done.returncode == 1
    assert "(c) errors: RuntimeError: made to fail" in done.stdout
    assert "(e) logprob: passed" in done.stdout
    assert "1 of 2 parts passed" in done.stdout
    found = json.loads(out.read_text())
    assert found["parts"]["errors"]["failed"] == ["RuntimeError: made to fail"]
    assert found["parts"]["logprob"]["GB/s"]["forward"] > 0
    again = run(out, "--resume", "--only", "errors", "logprob")
    assert again.returncode == 0
    assert "(c) errors: passed" in again.stdout
    assert "logprob:" not in again.stdout


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path):
    child = tmp_path / "child"
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(child.pid))
print("last words", flush=True)
time.sleep(600)
"""
    error, lines = parts.run_limited([sys.executable, "-c", script], 3)
    assert error == "over its limit of 3 s"
    assert lines == ["last words"]
    deadline = time.monotonic() + 30
    while _is_alive(child.read_text()):
        assert time.monotonic() < deadline, "the child of the part lives on"
        time.sleep(0.05)


def _is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_exit_codes_and_signals_are_told():
    assert parts.run_limited([sys.executable, "-c", ""], 60) == (None, [])
    assert parts.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60)[0] == "exit code 3"
    assert (
        parts.run_limited([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60)[0] == "killed by signal 9"
    )


@pytest.mark.parametrize(("off", "names"), [(0.0, []), (2e-3, ["score"]), (0.3, ["score", "train"])])
def test_no_time_of_a_wrong_result(off, names):
    want = torch.linspace(-3.0, -1.0, 16, dtype=torch.float64)
    contestants = {
        "score": lambda: ((want + off).float(),),
        "train": lambda: (gpu_head.dpo_loss(want + torch.arange(16) * off),),
    }
    assert list(gpu_head.wrong_results(contestants, want)) == names
