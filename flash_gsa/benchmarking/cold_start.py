"""How long a new process on a new machine takes to its first gradients: `python -m flash_gsa.benchmarking.cold_start`.

The caches of compiled kernels are empty the first time, and as that left them the second time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Any

from .shapes import Shape
from .worker import Failed, TookTooLong

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


def measure_cold_start(device: str, name: str, shape: Shape, limit: float) -> dict[str, Any]:
    """Seconds from import to the gradients of the first call, in a process with empty caches, then in another.

    Raises:
        TookTooLong: a process took longer than `limit` seconds.
        Failed: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {variable: os.path.join(folder, variable.lower()) for variable in CACHES}
        first = _child(device, name, shape, limit, environment)
        if "problem" in first:
            return first
        return {"first": first, "second": _child(device, name, shape, limit, environment)}


def _child(device: str, name: str, shape: Shape, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    task = json.dumps({"device": device, "name": name, "shape": asdict(shape)})
    command = [sys.executable, "-m", "flash_gsa.benchmarking.cold_start", task]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise TookTooLong(f"took longer than {limit:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(lines[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def main(task: str) -> None:
    """Run one forward and backward and print how long it took, as JSON."""
    start = time.perf_counter()
    from .gate import gradient_of_o, with_gradients
    from .implementations import implementation
    from .measurements import open_device, synchronize

    given = json.loads(task)
    shape = Shape(**given["shape"] | {"lengths": tuple(given["shape"]["lengths"])})
    place, candidate = open_device(given["device"]), implementation(given["name"])
    if reason := candidate.reason_against(shape, place):
        print(json.dumps({"problem": f"not run: {reason}"}))
        return
    imported = time.perf_counter()
    x = candidate.inputs(shape, place)
    do = gradient_of_o(x, shape)
    synchronize(place)
    ready = time.perf_counter()
    with_gradients(lambda y: candidate.forward(y, shape), x, do)
    synchronize(place)
    end = time.perf_counter()
    seconds = {"import": imported - start, "device_and_inputs": ready - imported, "first_call": end - ready}
    print(json.dumps(seconds | {"seconds": end - start}))


if __name__ == "__main__":
    main(sys.argv[1])
