import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_tritons_interpreter():
    """In a process of its own: whether a kernel is interpreted is settled when it is decorated, for good."""
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "interpreted_kernels.py")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, "see the output above"
    assert " passed" in done.stdout
