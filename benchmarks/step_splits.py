"""How a decoding step is best split on this card: `python -m benchmarks.step_splits --output FILE --minutes 5`.

Splits of `step_slots` and `step_linear`, beside `step` and PyTorch, each as a CUDA graph of many steps whose states
come from memory. Rows that FILE has stay, as runs of their own. Which rows are what the code chooses is marked in all
of them, also without a card and with --minutes 0. Needs Triton, and a GPU to measure.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_gsa.benchmarking.about import about, write
from flash_gsa.benchmarking.measurements import measure_ceilings
from flash_gsa.benchmarking.timing import Stopwatch, captured
from flash_gsa.ops.reference_linear import reference_linear_step
from flash_gsa.ops.triton import step, step_linear
from flash_gsa.ops.triton.step import Split

Row = dict[str, Any]
SLOTS = 64
# Name, query heads, heads, width of keys and of values.
LAYERS = (
    *(("1.3B", 4, 4, 512, 512), ("7B", 32, 8, 128, 128), ("340M", 4, 4, 256, 256)),
    *(("16 query heads on 8 of 128", 16, 8, 128, 128), ("64 query heads on 8 of 128", 64, 8, 128, 128)),
)
LINEAR = (
    *(("GLA", 4, 4, 256, 512), ("RetNet", 8, 8, 256, 512), ("HGRN2", 16, 16, 128, 128)),
    ("32 query heads on 8 of 128 × 128", 32, 8, 128, 128),
)
SEQUENCES = (64, 8, 256, 1, 16, 32, 1024, 2, 4)
"""In this order, until time ends."""
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IN_A_GRAPH = 1 << 30
"""Bytes of states that the steps of a graph have together, at least where so many fit 32 steps."""
EARLIER = "81ef5d9"
"""The commit of rows of a kernel that has changed since."""


def candidates(kernel: str, values: int) -> Iterator[Split]:
    """Splits worth timing: 16 or 32 numbers of a tile to a thread."""
    programs = (1, 2, 4, 8, 16) if kernel == "step_linear" else (1, 2, 4, 8)
    for P, tile, warps, stages in product(programs, (512, 1024, 2048), (1, 2, 4), (3, 4, 6)):
        wide_enough = kernel != "step_linear" or values >= P * step_linear.NARROWEST
        if tile // (32 * warps) in (16, 32) and wide_enough:
            yield Split(P, tile, warps, stages)


def chosen(row: Row, processors: int) -> Split | None:
    """What the code takes for a row's case; None: the older kernel, `step`."""
    R, groups = row["query_heads"] // row["heads"], row["sequences"] * row["heads"]
    if "slots" not in row:
        return step_linear.choose(groups, row["values"], R, processors)
    if not step.takes_slots(groups, R, processors):
        return None
    D = max(row["keys"], row["values"])
    return step.choose_by_slots(groups, row["slots"], D, R, FORMATS[row["state"]].itemsize, processors)


def marked(rows: list[Row], processors: int) -> list[Row]:
    """The rows, those that are what the code chooses with "chosen"."""
    found = []
    for row in rows:
        row = {name: value for name, value in row.items() if name != "chosen"}
        if row["commit"] != EARLIER and row["kernel"] != "PyTorch":
            split = chosen(row, processors)
            if "tile" in row:
                mine = split == Split(*(row[name] for name in ("programs", "tile", "warps", "stages")))
            else:
                mine = split is None and row["kernel"] == "step"
            row |= {"chosen": True} if mine else {}
        found.append(row)
    return found


def measured(
    layer: tuple[str, int, int, int, int],
    sequences: int,
    state: str,
    timed: Callable[[Callable[[], object]], float],
    device: torch.device,
    *,
    linear: bool,
) -> Iterator[Row]:
    """Rows of one case; `timed` gives the seconds of a call."""
    name, HQ, H, K, V = layer
    told = {"layer": name, "query_heads": HQ, "heads": H, "keys": K, "values": V}
    told |= ({} if linear else {"slots": SLOTS}) | {"sequences": sequences, "state": state}

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sequences, *size, dtype=dtype, device=device).normal_()

    q, k, v = normal(HQ, K), normal(H, K), normal(H, V)
    g = -normal(H, K if linear else SLOTS, dtype=torch.float32).abs()
    a_step = sequences * H * (K * V if linear else SLOTS * (K + V)) * FORMATS[state].itemsize
    count = max(1, min(32, IN_A_GRAPH // a_step))
    calls: list[tuple[str, Split | None, Callable[[Any], object]]] = []
    if linear:
        states: list[Any] = [normal(H, K, V, dtype=FORMATS[state]) for _ in range(count)]
        for c in candidates("step_linear", V):
            calls.append(("step_linear", c, lambda s, c=c: step_linear.launch(q, k, v, g, s, s, 1.0, c)))
        calls.append(("PyTorch", None, lambda s: reference_linear_step(q, k, v, g, s, 1.0)))
    else:
        # By slots, as prefill leaves them.
        hks, hvs = ([normal(H, SLOTS, width, dtype=FORMATS[state]) for _ in range(count)] for width in (K, V))
        states = [(hk.transpose(2, 3), hv) for hk, hv in zip(hks, hvs, strict=True)]
        for c in candidates("step_slots", V):
            calls.append(("step_slots", c, lambda s, c=c: step.launch(q, k, v, g, None, s, s, 1.0, c)))
        calls.append(("step", None, lambda s: _two_passes(q, k, v, g, s)))
    for kernel, split, call in calls:
        seconds = timed(lambda call=call: [call(s) for s in states])
        of_split = {} if split is None else vars(split)
        yield told | {"kernel": kernel, **of_split, "microseconds": [round(1e6 * seconds / count, 2)]}


def _two_passes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """`step` on states that `step_slots` could take."""
    own = step.lies_by_slots
    step.lies_by_slots = lambda state: False
    try:
        return step.launch(q, k, v, g, None, state, state, 1.0)
    finally:
        step.lies_by_slots = own


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_splits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--commit")
    options = parser.parse_args()
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    if options.minutes <= 0:
        if not before:
            parser.error(f"{options.output} has no rows to mark; measure some with --minutes 5")
        write(before | {"rows": marked(before["rows"], before["multiprocessors"])}, options.output)
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on; --minutes 0 marks the rows that FILE has")
    device, end = torch.device("cuda"), time.monotonic() + 60 * options.minutes
    command = shlex.join(["python", "-m", "benchmarks.step_splits", *sys.argv[1:]])
    told = about(command, "cuda", options.commit)
    processors = step.processors_of(device)
    if before and before["multiprocessors"] != processors:
        parser.error(
            f"{options.output} is of cards with {before['multiprocessors']} multiprocessors, this one has "
            f"{processors}; choose another file"
        )
    ceilings = measure_ceilings("cuda", 1 << 30, 8192, 0.2, 3)
    stopwatch = Stopwatch(device, 0.025, 3)
    rows = before.get("rows", [])
    run = 1 + max((row["run"] for row in rows), default=0)

    def timed(call: Callable[[], object]) -> float:
        with torch.no_grad():
            return stopwatch.cost(captured(call, device), flush=False).seconds

    cases = [(layer, state, False) for layer in LAYERS for state in FORMATS] + [(x, "float32", True) for x in LINEAR]
    for sequences, (layer, state, linear) in product(SEQUENCES, cases):
        if time.monotonic() < end:
            found = list(measured(layer, sequences, state, timed, device, linear=linear))
            best = min(found, key=lambda row: row["microseconds"])
            print(f"{layer[0]}, {sequences} sequences, {state}: {best['microseconds'][0]} µs, {best}", flush=True)
            rows += [{"run": run, "commit": told["commit"], **row} for row in found]
    result = {"about": told, **before, "rows": marked(rows, processors), "multiprocessors": processors}
    result["later"] = [*before.get("later", []), told] if before else []
    result.setdefault("bytes_per_second", ceilings["copy"]["bytes_per_second"])
    write(result, options.output)


if __name__ == "__main__":
    main()
