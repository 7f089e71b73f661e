"""The operator on this machine's CPU, `reference` against `chunk`: `python -m benchmarks.op_cpu`, or `make bench`.

Times are medians of repeated calls in float32, forward and forward + backward. Nothing is timed before `chunk` agrees
with the recurrence in float64 at every shape: values at full length, gradients on the first 512 tokens
(the recurrence keeps every state for its backward: longer ones do not fit into memory). The recurrence is timed
up to 2048 tokens.

Prints a table and writes benchmarks/results/op_cpu.json with device, versions, commit, date and command.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.about import about
from flash_gsa import gated_slot_attention

RESULTS = Path(__file__).parent / "results" / "op_cpu.json"
CHECKED_WITH_GRADIENTS = 512
LONGEST_REFERENCE = 2048
BACKENDS = ("reference", "chunk")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; `lengths` packs sequences (then T is their sum and B = 1)."""

    T: int = 2048
    B: int = 1
    HQ: int = 4
    H: int = 4
    K: int = 64
    V: int = 64
    M: int = 64
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        heads = f"H {self.H}" if self.HQ == self.H else f"HQ {self.HQ}, H {self.H}"
        packed = f", {len(self.lengths)} packed" if self.lengths else ""
        return f"B {self.B}, T {self.T}, {heads}, K {self.K}, V {self.V}, M {self.M}{packed}"


TARGET = Shape()
SHAPES = (
    TARGET,
    Shape(T=512),
    Shape(T=1024),
    Shape(T=4096),
    Shape(T=8192),
    Shape(B=4, T=512),
    Shape(HQ=8, H=2),
    Shape(lengths=(700, 1, 64, 900, 255, 128)),
)


def inputs(shape: Shape) -> list[Tensor]:
    """q, k, v, g as a trained layer has them: SiLU of normal numbers, logsigmoid(N(0, 1)) / 8."""
    random = torch.Generator().manual_seed(0)

    def normal(heads: int, size: int) -> Tensor:
        return torch.randn(shape.B, shape.T, heads, size, generator=random)

    q, k, v = normal(shape.HQ, shape.K), normal(shape.H, shape.K), normal(shape.H, shape.V)
    return [F.silu(q), F.silu(k), F.silu(v), F.logsigmoid(normal(shape.H, shape.M)) / 8]


def call(backend: str, x: list[Tensor], shape: Shape) -> Tensor:
    bounds = torch.tensor([0, *accumulate(shape.lengths)]) if shape.lengths else None
    return gated_slot_attention(*x, cu_seqlens=bounds, backend=backend)[0]


def with_gradients(backend: str, x: list[Tensor], shape: Shape, grad: Tensor) -> list[Tensor]:
    """o and the gradients of q, k, v, g, given that of o."""
    leaves = [tensor.detach().requires_grad_() for tensor in x]
    o = call(backend, leaves, shape)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))]


def gradient(shape: Shape) -> Tensor:
    """A gradient of o [B, T, HQ, V]."""
    return torch.randn(shape.B, shape.T, shape.HQ, shape.V, generator=torch.Generator().manual_seed(1))


def shortened(shape: Shape) -> Shape:
    """The same sizes with at most CHECKED_WITH_GRADIENTS tokens."""
    if shape.T <= CHECKED_WITH_GRADIENTS:
        return shape
    if not shape.lengths:
        return replace(shape, T=CHECKED_WITH_GRADIENTS)
    lengths = tuple(max(1, length * CHECKED_WITH_GRADIENTS // shape.T) for length in shape.lengths)
    return replace(shape, T=sum(lengths), lengths=lengths)


def largest_error(shape: Shape) -> float:
    """Distance of `chunk` from float64, relative, the worst of o and the gradients.

    Raises:
        SystemExit: it is more than twice that of the recurrence in float32 (and some units in the last place).
    """
    worst = 0.0
    short = shortened(shape)

    def outputs(backend: str, dtype: torch.dtype) -> list[Tensor]:
        with torch.no_grad():
            whole = call(backend, [tensor.to(dtype) for tensor in inputs(shape)], shape)
        part = [tensor.to(dtype) for tensor in inputs(short)]
        return [whole, *with_gradients(backend, part, short, gradient(short))]

    exact, plain = outputs("reference", torch.float64), outputs("reference", torch.float32)
    names = ("o", "o (start)", "dq", "dk", "dv", "dg")
    for name, got, near, want in zip(names, outputs("chunk", torch.float32), plain, exact, strict=True):
        error, usual = (float((y.double() - want).norm() / want.norm()) for y in (got, near))
        if not error <= 2 * usual + 8 * torch.finfo(torch.float32).eps:
            raise SystemExit(
                f"chunk is wrong at {shape}: {name} is off by {error:.1e} of its norm, the recurrence in float32 "
                f"by {usual:.1e}. No times are taken; run `python -m pytest tests/ops` to see what is broken."
            )
        worst = max(worst, error)
    return worst


def median_seconds(run: Callable[[], object], budget: float) -> tuple[float, int]:
    """Median time of a call and how many were timed: as many as fit into `budget` seconds, up to 20.

    The first call warms up; where it alone takes longer than the budget, it is the one that counts.
    """
    times: list[float] = []
    warm = False
    while not times or (sum(times) < budget and len(times) < 20):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if warm or seconds > budget:
            times.append(seconds)
        warm = True
    return statistics.median(times), len(times)


def measure(shape: Shape, budget: float) -> list[dict]:
    """One record for each backend and pass."""
    x, grad, records = inputs(shape), gradient(shape), []
    for backend in BACKENDS:

        def forward(backend=backend):
            with torch.no_grad():
                call(backend, x, shape)

        def both(backend=backend):
            with_gradients(backend, x, shape, grad)

        for name, run in (("forward", forward), ("forward + backward", both)):
            if backend == "reference" and shape.T > LONGEST_REFERENCE:
                continue
            seconds, repeats = median_seconds(run, budget)
            records.append(
                {"shape": asdict(shape), "backend": backend, "pass": name, "seconds": seconds, "repeats": repeats}
            )
    return records


def speedups(records: list[dict], name: str) -> dict[str, float]:
    """{shape: how many times faster chunk is than reference} where both were timed."""
    seconds = {(str(as_shape(r)), r["backend"]): r["seconds"] for r in records if r["pass"] == name}
    shapes = dict.fromkeys(shape for shape, _ in seconds)
    return {
        shape: seconds[shape, "reference"] / seconds[shape, "chunk"]
        for shape in shapes
        if (shape, "reference") in seconds
    }


def as_shape(record: dict) -> Shape:
    return Shape(**(record["shape"] | {"lengths": tuple(record["shape"]["lengths"])}))


def table(records: list[dict], errors: dict[str, float], about: dict) -> Table:
    caption = f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}, {about['commit']}"
    made = Table(title="Gated slot attention on the CPU, float32, medians", caption=caption)
    for heading in ("shape", "pass", "reference ms", "chunk ms", "times faster", "chunk tokens/s", "error of chunk"):
        made.add_column(heading, justify="left" if heading in ("shape", "pass") else "right")
    for name in ("forward", "forward + backward"):
        faster = speedups(records, name)
        reference = {str(as_shape(r)): r for r in records if r["pass"] == name and r["backend"] == "reference"}
        for record in records:
            if record["pass"] != name or record["backend"] != "chunk":
                continue
            shape = as_shape(record)
            row = str(shape)
            made.add_row(
                row,
                name,
                f"{1000 * reference[row]['seconds']:.1f}" if row in reference else "–",
                f"{1000 * record['seconds']:.1f}",
                f"{faster[row]:.1f}" if row in faster else "–",
                f"{shape.B * shape.T / record['seconds']:,.0f}",
                f"{errors[row]:.1e}",
            )
        made.add_section()
    return made


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op_cpu", description="reference against chunk on the CPU"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (JSON)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the repeats of one measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; all cores unless given")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, about_run = Console(), about("python -m benchmarks.op_cpu")

    errors: dict[str, float] = {}
    for shape in SHAPES:
        console.print(f"checking {shape}", style="dim")
        errors[str(shape)] = largest_error(shape)
    records: list[dict] = []
    for shape in SHAPES:
        console.print(f"timing {shape}", style="dim")
        records += measure(shape, options.seconds)

    for record in records:
        if record["backend"] == "chunk":
            record["error"] = errors[str(as_shape(record))]
    console.print(table(records, errors, about_run))
    factor = speedups(records, "forward + backward")[str(TARGET)]
    console.print(f"{TARGET}: chunk is {factor:.1f} times faster, forward + backward (wanted: at least 20)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about_run, "results": records}, indent=1) + "\n")
    console.print(f"written: {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
