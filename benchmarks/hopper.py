"""Compiling for an H100 without one.

Triton brings what compiles for NVIDIA's GPUs, and asks a driver only for which: `Driver` answers. With it, calls with
tensors that have no memory compile and do not run (`flash_gsa.ops.triton.launching`).
"""

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget

MULTIPROCESSORS = 132
REGISTERS = 65536
"""Of a multiprocessor."""
SHARED_BYTES = 232448
"""That a program may have; a multiprocessor has a KiB more for each that it runs, and 228 KiB in all."""
_H100 = {
    "max_shared_mem": SHARED_BYTES,
    "max_num_regs": REGISTERS,
    "multiprocessor_count": MULTIPROCESSORS,
    "warpSize": 32,
}


class Driver:
    """What the compiler asks of it."""

    utils = SimpleNamespace(get_device_properties=lambda device: _H100)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def map_python_to_cpp_type(self, kind):
        return kind
