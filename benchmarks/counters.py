"""What the GPU's counters say of the operator's kernels: `python -m benchmarks.counters --output FILE`.

Every launch of one forward and backward, the second of a process, runs under NVIDIA's profiler `ncu`, which repeats it
until all counters are read. It keeps the clock free (`--clock-control none`), so times are near those of a benchmark.
Needs a GPU whose counters may be read.
"""

import argparse
import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flash_gsa.benchmarking.about import about, write
from flash_gsa.benchmarking.shapes import SUITES, Shape
from flash_gsa.errors import UsageError

LABELS = ("1.3B-8x2048", "340M-8x2048")
KERNELS = (
    *("prepare", "states_forward", "outputs", "values_backward", "states_backward", "inputs_backward"),
    "gates_backward",
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("long_scoreboard", "barrier", "wait", "short_scoreboard", "no_instruction", "not_selected", "selected"),
    *("gmma", "lg_throttle", "mio_throttle", "math_pipe_throttle", "branch_resolving", "dispatch_stall", "drain"),
    *("imc_miss", "membar", "misc", "sleeping", "tex_throttle"),
)
"""What a warp does between two of its instructions, in ncu's words; `selected`: it issues the second one."""
COUNTERS = {
    "seconds": "gpu__time_duration.sum",
    "bytes_per_second": "dram__bytes.sum.per_second",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
}
SCALE = {"seconds": 1e-9}
"""ncu's base units where they are not these."""


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One record a launch of ncu's table (`--csv --page raw --print-units base`).

    Raises:
        UsageError: there is no table among the lines, or a counter has no value.
    """
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        raise UsageError("ncu printed no counters; it needs the right to read them (NVIDIA's ERR_NVGPUCTRPERM)")
    names, _, *launches = rows
    records = []
    for launch in launches:
        found = dict(zip(names, launch, strict=True))

        def number(counter: str, found: dict[str, str] = found) -> float:
            try:
                return float(found[counter].replace(",", ""))
            except (KeyError, ValueError):
                kernel = found.get("Kernel Name", "a kernel")
                raise UsageError(f"ncu has no {counter} of {kernel}: {found.get(counter)!r}") from None

        stalls = {name: number(STALL.format(name)) for name in STALLS}
        total = sum(stalls.values())
        records.append(
            {"kernel": found["Kernel Name"]}
            | {name: number(counter) * SCALE.get(name, 1) for name, counter in COUNTERS.items()}
            | {"stalls": {name: round(share / total, 4) for name, share in stalls.items() if share}}
        )
    return records


def measure(shape: Shape) -> list[dict[str, Any]]:
    """`read` of a forward and backward at a shape.

    Raises:
        UsageError: there is no ncu here, or it cannot read the counters.
    """
    if shutil.which("ncu") is None:
        raise UsageError("there is no ncu here; it comes with CUDA's toolkit (Nsight Compute)")
    counters = ",".join([*COUNTERS.values(), *(STALL.format(name) for name in STALLS)])
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--metrics", counters]
    command += ["--csv", "--page", "raw", "--print-units", "base"]
    command += [sys.executable, "-m", "benchmarks.counters", "--call", shape.label]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"ncu failed: {(done.stdout + done.stderr).strip()[-500:]}")
    return [record for record in read(done.stdout.splitlines()) if record["kernel"] in KERNELS]


def call(shape: Shape) -> None:
    """What is profiled: the second of two forwards and backwards."""
    from flash_gsa.benchmarking.gate import gradient_of_o, with_gradients
    from flash_gsa.benchmarking.implementations import layer_inputs
    from flash_gsa.ops.triton.library import attention

    x = layer_inputs(shape, torch.device("cuda"))
    do = gradient_of_o(x, shape).bfloat16()
    x = {name: y if name == "g" else y.bfloat16() for name, y in x.items()}

    def forward(x: dict[str, torch.Tensor]) -> torch.Tensor:
        return attention(*(x[name] for name in "qkvg"), None, None, None, None, 1.0, False, False)[0]

    with_gradients(forward, x, do)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    with_gradients(forward, x, do)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Read the counters, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description="counters of the kernels")
    parser.add_argument("--output", type=Path, metavar="FILE", help="result file (JSON)")
    parser.add_argument("--commit", help="the commit of the code, where git cannot say it")
    parser.add_argument("--call", metavar="SHAPE", help="only make the call that is profiled")
    options = parser.parse_args(arguments)
    shapes = {shape.label: shape for shape in SUITES["gpu"].shapes}
    if options.call:
        return call(shapes[options.call])
    if options.output is None:
        parser.error("--output is needed")
    if not torch.cuda.is_available():
        parser.error("counters are read on a CUDA device, and there is none here; run it where there is one")
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.counters", *typed])
    result: dict[str, Any] = {"about": about(command, "cuda", options.commit), "shapes": []}
    for label in LABELS:
        kernels = measure(shapes[label])
        result["shapes"].append({"shape": asdict(shapes[label]) | {"label": label}, "kernels": kernels})
        write(result, options.output)
        for k in kernels:
            say(f"{label} {k['kernel']}: {1e6 * k['seconds']:.0f} µs, {k['bytes_per_second'] / 1e12:.2f} TB/s")


if __name__ == "__main__":
    main()
