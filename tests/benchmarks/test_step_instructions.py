"""Instructions of a loop, warps at a time, and the table of both; the tool itself on what Triton compiles here."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from benchmarks.hopper import addresses  # noqa: E402
from benchmarks.step_instructions import longest_loop, warps_at_a_time  # noqa: E402

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   FADD R2, R2, 1 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   FMUL R3, R3, R4 ;
        /*0040*/                   FADD R3, R3, R4 ;
        /*0050*/              @!P1 BRA 0x30 ;
        /*0060*/                   BRA 0x80 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   BRA 0x80;
"""


def test_the_longest_stretch_that_is_repeated():
    instructions = addresses(SASS)
    assert len(instructions) == 10
    assert instructions[1] == (0x10, "FADD R2, R2, 1 ")
    assert longest_loop(instructions) == 3
    assert longest_loop(instructions[:3]) == 2
    assert longest_loop(instructions[6:9]) == 0  # forward, and to itself


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "found"),
    [
        (64, 4, 0, 32),  # 8,192 registers a program
        (65, 4, 0, 28),  # allotted by 8 to a thread
        (219, 2, 0, 8),
        (32, 1, 0, 32),  # no more than 32 programs
        (32, 4, 0, 64),  # no more than 64 warps
        (32, 4, 99 * 1024, 8),
    ],
)
def test_warps_at_a_time(registers, warps, shared, found):
    assert warps_at_a_time(registers, warps, shared) == found


@pytest.mark.timeout(600)
def test_what_is_compiled_here(tmp_path):
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"rows": [{"commit": "before"}]}))
    command = [sys.executable, "-m", "benchmarks.step_instructions", "--output", str(file)]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rows = json.loads(file.read_text())["rows"]
    assert first == {"commit": "before"}
    assert [(r["layer"], r["state"]) for r in rows] == [(n, s) for n in ("1.3B", "7B") for s in ("float32", "bfloat16")]
    for r in rows:
        # A number is read, decays, gets its addition and is written; it is read by each query head: the least there is.
        heads = 4 if r["layer"] == "7B" else 1
        assert 4 + heads < r["instructions_a_number"] < 12 * (1 + heads)
        assert r["registers"] < 255
        assert r["warps"] >= 8
