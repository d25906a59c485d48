import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_kernels_in_tritons_interpreter(capsys):
    """In a separate process: whether a kernel is interpreted is decided for good when it is decorated.

    Prints the table of errors, whatever pytest's options for output.
    """
    files = sorted(map(str, Path(__file__).parent.glob("interpreted_*.py")))
    assert len(files) == 5
    command = [sys.executable, "-m", "pytest", "-q", "-s", *files]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, "see the output above"
    assert " passed" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 6
    with capsys.disabled():
        print("\nerrors of the Triton kernels against fp64, bf16 inputs, in Triton's interpreter", *table, sep="\n")
