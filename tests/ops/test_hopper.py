"""Every kernel compiles for an H100: what the interpreter runs, a compiler may refuse."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest


def kernels() -> set[str]:
    """What the package compiles and no other compiled function calls, by module and name."""
    import triton

    import flash_gsa.ops.triton as package

    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        for name, value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
            if isinstance(value, triton.JITFunction):
                found[f"{value.fn.__module__}.{name}"] = value.src
    called = {
        full
        for full in found
        if any(calls(source, full.split(".")[-1]) for other, source in found.items() if other != full)
    }
    return found.keys() - called


def calls(source: str, name: str) -> bool:
    return re.search(rf"(?<!def )\b{name}\(", source) is not None


@pytest.mark.long
@pytest.mark.timeout(1800)  # one process that compiles for a minute, and others beside it
def test_every_kernel_compiles_for_an_h100(tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.hopper"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]).keys() == kernels()
