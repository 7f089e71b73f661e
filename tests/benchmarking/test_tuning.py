"""All candidates of a kernel that tunes itself are compiled before the first of them is timed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

# Kernels are compiled for a GPU that is not there; what would be launched and timed is only counted.
PROGRAM = """
import sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from flash_gsa.benchmarking.tuning import compiled_in_parallel

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Driver())
compiled_when_timed, launched, run = [], [], JITFunction.run

def count_launches(self, *args, warmup, **kwargs):
    if warmup:
        return run(self, *args, warmup=True, **kwargs)
    launched.append(kwargs["SIZE"])

JITFunction.run = count_launches

def timed(call, quantiles):
    compiled_when_timed.append(len(kernel.fn.device_caches[0][0]))
    return [float(len(compiled_when_timed))] * 3

@triton.autotune([triton.Config({"SIZE": size}) for size in (16, 32, 64)], key=["n"], do_bench=timed)
@triton.jit
def kernel(x, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

before = triton.runtime.autotuner.Autotuner.prune_configs
with compiled_in_parallel(2):
    kernel[(1,)](torch.zeros(8), n=8)
assert triton.runtime.autotuner.Autotuner.prune_configs is before
print(compiled_when_timed, launched)
"""


def test_candidates_are_compiled_at_once(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "[3, 3, 3] [16]", done.stderr
