"""What the rows of the tile table compile to: `python -m benchmarks.tile_registers --output FILE`.

Registers of a thread, instructions that move one to memory or back for want of more, and shared memory, of each kernel
of a forward and backward: Hopper's rows for an H100, those for any GPU for an A100 and for an Ada card. What blocks
with strong gates take is a function of its own, whose instructions are counted apart. Compiled, not run. Needs Triton,
but no GPU.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver

from benchmarks.hopper import SHARED_BYTES, Driver, instructions, registers, spills
from flash_gsa.benchmarking.about import about, write
from flash_gsa.benchmarking.tune_candidates import WORKLOADS, Workload
from flash_gsa.ops.triton import launching, tiles
from flash_gsa.ops.triton.library import attention, linear_attention

OTHERS = ((8, 0), (8, 9))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def workloads(architecture: tuple[int, int]) -> list[tuple[tiles.Row, Workload]]:
    """A row of the table that holds there, each row once, and the first workload of `bench tune` that it is for."""
    found: dict[int, tuple[tiles.Row, Workload]] = {}
    in_bfloat16 = next(workload for workload in WORKLOADS if workload.name == "1.3B-128")
    for workload in (*WORKLOADS, replace(in_bfloat16, name="1.3B-128-fp32", dtype=FP32)):
        row = workload.row(architecture)
        found.setdefault(id(row), (row, workload))
    return list(found.values())


def compiled(row: tiles.Row, workload: Workload) -> list[dict[str, Any]]:
    """What each kernel of a forward and backward needs with the row's tiles."""
    found: list[dict[str, Any]] = []
    seen, own = set(), launching.launch

    def kept(variant, programs, arguments):
        kernel = own(variant, programs, arguments)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            common, rare = spills(instructions(kernel))
            name = variant.kernel.fn.__name__
            if name == "inputs_backward":
                name += ", keys" if variant.constants.get("QUERIES") else ", values"
            numbers = {"registers": registers(kernel), "spills": common, "spills_under_strong_gates": rare}
            numbers |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            found.append({"kernel": name, **numbers})
        return kernel

    shape = workload.shape

    def empty(heads: int, size: int, dtype: torch.dtype = workload.dtype) -> torch.Tensor:
        return torch.empty(shape.B, shape.T, heads, size, dtype=dtype, device="meta", requires_grad=True)

    q, k, v = empty(shape.HQ, shape.K), empty(shape.H, shape.K), empty(shape.H, shape.V)
    g = empty(shape.H, shape.K if workload.linear else shape.M, FP32)
    launching.launch = kept
    try:
        with tiles.using(workload.tiles(row.tiles)):
            if workload.linear:
                o = linear_attention(q, k, v, g, None, None, 1.0, False)[0]
            else:
                o = attention(q, k, v, g, None, None, None, None, 1.0, False, False)[0]
            o.backward(torch.empty_like(o))
    finally:
        launching.launch = own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_registers")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.tile_registers", *sys.argv[1:]])
    told = about(command, "cpu", options.commit)
    rows = []
    for architecture in (tiles.HOPPER, *OTHERS):
        driver.set_active(Driver(architecture))
        for row, workload in workloads(architecture):
            kernels = compiled(row, workload)
            rows.append(
                {
                    "architecture": architecture,
                    "any": row.architecture is None,
                    "workload": workload.name,
                    "precision": str(workload.dtype).removeprefix("torch."),
                    "slots": row.slots,
                    "C": row.tiles.C,
                    "BT": row.tiles.BT,
                    "measured": "not measured" not in row.reason,
                    "may_have_shared_bytes": SHARED_BYTES[architecture],
                    "kernels": kernels,
                }
            )
            most = max(k["spills"] for k in kernels)
            print(f"{architecture} {workload.name}: {len(kernels)} kernels, at most {most} spills", flush=True)
    write({"about": told, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
