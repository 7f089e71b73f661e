"""What a decoding step does for a number of the state: `python -m benchmarks.step_instructions --output FILE`.

Compiled for an H100 and read, not run: the instructions of the loop over slots, for each number that a warp's 32 lanes
read and write; registers; and how many warps a multiprocessor holds with that. Four instructions a cycle is what it can
issue at most. Rows of other commits that FILE has stay, to be compared. Needs Triton, but no GPU.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

from benchmarks.hopper import MULTIPROCESSORS, REGISTERS, Driver, instructions, registers
from flash_gsa.benchmarking.about import about, write
from flash_gsa.ops.triton import launching, step

# Name, query heads, key/value heads, width of a head, slots.
LAYERS = (("1.3B", 4, 4, 512, 64), ("7B", 32, 8, 128, 64))
FORMATS = (torch.float32, torch.bfloat16)
SEQUENCES = 1024
"""So many that one program has a head."""
CYCLES = 1.98e9
"""A second, at most."""
ISSUED = 4
"""Instructions of a warp a cycle and multiprocessor, at most."""
SHARED_KIB = 228
"""Of a multiprocessor, a KiB of it for each program."""


def longest_loop(instructions: list[tuple[int, str]]) -> int:
    """Instructions from the target of a jump back to the jump, in the longest such stretch; jumps to themselves, as at
    the end of a program, do not count. 0: there is no loop."""
    found = 0
    for at, text in instructions:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and (target := int(jump[1], 16)) < at:
            found = max(found, sum(target <= place <= at for place, _ in instructions))
    return found


def warps_at_a_time(registers: int, warps: int, shared: int) -> int:
    """Of programs of so many warps, registers a thread and bytes of shared memory, on one multiprocessor."""
    of_a_warp = 32 * (-(-registers // 8) * 8)
    programs = min(REGISTERS // (of_a_warp * warps), SHARED_KIB * 1024 // (shared + 1024), 32, 64 // warps)
    return programs * warps


def row(name: str, HQ: int, H: int, width: int, M: int, state: torch.dtype) -> dict[str, Any]:
    """What is read off one layer's kernel."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(SEQUENCES, *size, dtype=dtype, device="meta")

    compiled, own = [], launching.launch

    def kept(variant, programs, arguments):
        compiled.append((own(variant, programs, arguments), variant.constants))
        return compiled[-1][0]

    hk, hv = (empty(H, M, width, dtype=state) for _ in "kv")
    states = (hk.transpose(2, 3), hv)
    split = step.choose_by_slots(SEQUENCES * H, M, width, HQ // H, state.itemsize, MULTIPROCESSORS)
    launching.launch = kept
    try:
        token = (empty(HQ, width), empty(H, width), empty(H, width), empty(H, M, dtype=torch.float32), None)
        step.launch(*token, states, states, 1.0, split)
    finally:
        launching.launch = own
    [(kernel, constants)] = compiled
    used = registers(kernel)
    loop = longest_loop(instructions(kernel))
    a_turn = 2 * constants["BM"] * width  # numbers of both states
    each = loop * 32 * split.warps / a_turn
    numbers = 2 * SEQUENCES * H * M * width
    return {
        "triton": triton.__version__,
        "layer": name,
        "state": str(state).removeprefix("torch."),
        "sequences": SEQUENCES,
        "registers": used,
        "warps": warps_at_a_time(used, split.warps, kernel.metadata.shared),
        "loop": loop,
        "instructions_a_number": each,
        "issue_seconds": numbers / 32 * each / (ISSUED * MULTIPROCESSORS * CYCLES),
        "bytes": 2 * numbers * state.itemsize,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_instructions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit")
    options = parser.parse_args()
    driver.set_active(Driver())
    command = shlex.join(["python", "-m", "benchmarks.step_instructions", *sys.argv[1:]])
    told = about(command, "cpu", options.commit)
    rows = [{"commit": told["commit"], **row(*layer, state)} for layer in LAYERS for state in FORMATS]
    before = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    others = [r for r in before if r["commit"] != told["commit"]]
    write({"about": told, "rows": others + rows}, options.output)


if __name__ == "__main__":
    main()
