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


def resources(kernel: Any) -> tuple[int, int]:
    """(registers of a thread, bytes of it that are in memory for want of registers) of a compiled kernel."""
    used = printed(kernel, "-res-usage")
    return tuple(int(re.findall(rf"{name}:(\d+)", used)[0]) for name in ("REG", "STACK"))


def printed(kernel: Any, option: str) -> str:
    """What cuobjdump, which Triton brings, says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
