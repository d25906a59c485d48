"""The benchmark of optimizers, tiny on a CPU: who runs is timed, who fails is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_optimizer.py"


def test_every_contestant_that_runs_here_is_timed(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", "time", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    part = json.loads(out.read_text())["parts"]["time"]
    assert part["failed"] == []
    timed = part["ms per 1e9 parameters"]
    assert {"ours bf16+8", "ours fp32", "torch fused bf16", "torch fused fp32"} <= timed.keys()
    assert all(value > 0 for value in timed.values())
