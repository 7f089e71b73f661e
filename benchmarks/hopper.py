"""Compiling for a GPU without one.

Triton brings what compiles for NVIDIA's GPUs, and asks a driver only for which: `Driver` answers. With it, calls with
tensors that have no memory compile and do not run (`flash_gsa.ops.triton.launching`).
"""

import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

MULTIPROCESSORS = 132
"""Of an H100."""
REGISTERS = 65536
"""Of a multiprocessor."""
SHARED_BYTES = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448}
"""That a program may have, by compute capability; a multiprocessor has a KiB more for each that it runs."""


class Driver:
    """What the compiler asks of it: of an H100, or of another GPU of SHARED_BYTES."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        properties = {
            "max_shared_mem": SHARED_BYTES[capability],
            "max_num_regs": REGISTERS,
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": 32,
        }
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def map_python_to_cpp_type(self, kind):
        return kind


def registers(kernel: Any) -> int:
    """Of a thread of a compiled kernel."""
    return int(re.findall(r"REG:(\d+)", printed(kernel, "-res-usage"))[0])


def instructions(kernel: Any) -> list[tuple[int, str]]:
    """(address, instruction) of all instructions of a compiled kernel."""
    return addresses(printed(kernel, "-sass"))


def addresses(sass: str) -> list[tuple[int, str]]:
    """The same of what cuobjdump prints."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]


def spills(found: list[tuple[int, str]]) -> tuple[int, int]:
    """Instructions that move a register to memory or back for want of registers: (in the kernel, in what it calls).

    Functions that are not inlined lie behind it.
    """
    calls = [int(to, 16) for _, text in found if (to := "".join(re.findall(r"\bCALL\b.*?0x([0-9a-f]+)", text)))]
    end = min(calls, default=found[-1][0] + 1)
    moved = [at for at, text in found if re.search(r"\b(LDL|STL)\b", text)]
    return sum(at < end for at in moved), sum(at >= end for at in moved)


def printed(kernel: Any, option: str) -> str:
    """What cuobjdump, which Triton brings, says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
