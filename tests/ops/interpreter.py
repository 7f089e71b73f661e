"""Running a test file in Triton's interpreter, which is chosen when triton is imported: in a process of its own."""

import os
import subprocess
import sys


def run_in_interpreter(file: str) -> None:
    """Every test of the file that needs no GPU; some must be there, and all must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
