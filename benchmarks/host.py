"""What a call of the operator takes of the host: `python -m benchmarks.host --output FILE`.

Everything that Python does of a call is done but the launches themselves: a compiled kernel is found, told its
arguments, and does nothing. What the driver takes comes on top, so these are no times of calls; they tell what a change
of the code around the launches gives, on one machine and in one run. Needs Triton, but no GPU.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from flash_gsa.benchmarking.about import about, write
from flash_gsa.benchmarking.timing import Stopwatch
from flash_gsa.ops.triton import ahead, launching, plan, tables
from flash_gsa.ops.triton.library import attention

# Nobody looks into the tensors, so small ones do: a CPU takes longer to allocate large ones than a GPU does.
HEADS, WIDTH, SLOTS, LENGTH, SEQUENCES = 1, 64, 64, 256, 16
BUDGET, REPEATS = 0.3, 9  # seconds of each measurement, and of how many parts the median is told


class Idle:
    """A compiled kernel that is launched as Triton's are, and does nothing."""

    name, src, function, packed_metadata = "idle", None, 0, (4, 1, 0)
    __getitem__, launch_metadata = CompiledKernel.__getitem__, CompiledKernel.launch_metadata

    def _init_handles(self) -> None:
        pass

    def run(self, *told: Any) -> None:
        pass


class Driver:
    """As much of Triton's driver as a launch asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0


@contextmanager
def idle_launches() -> Iterator[list[str]]:
    """Within it kernels are neither compiled nor run; yields the names of those that were new."""
    found: list[str] = []

    def compile_nothing(variant: launching.Variant, programs: int, arguments: tuple, key: tuple) -> Idle:
        found.append(variant.kernel.fn.__name__)
        names = variant.kernel.arg_names[len(arguments) :]
        variant.compiled[key] = idle, tuple(variant.constants[name] for name in names)
        return idle

    idle, own = Idle(), (launching._compile, ahead.INTERPRETED, triton.runtime.driver._active)
    launching._compile, ahead.INTERPRETED = compile_nothing, True  # which rehearses nothing
    triton.runtime.driver.set_active(Driver())
    _forget()
    try:
        yield found
    finally:
        launching._compile, ahead.INTERPRETED = own[:2]
        triton.runtime.driver._active = own[2]
        _forget()  # what is idle here must not be found by a call afterwards


def _forget() -> None:
    launching.variant.cache_clear()
    plan.variants.cache_clear()
    plan._plans.clear()


@contextmanager
def as_on_the_device() -> Iterator[None]:
    """Within it boundaries are planned as if they were on a GPU: not compared, tables by kernels."""
    own = plan.kept, plan.Parts.tables
    plan.kept = lambda cuts, sizes, device, cu_seqlens, make: make(cu_seqlens)
    plan.Parts.tables = lambda self, device: tables.parts_of(self.cu_seqlens, self.span, self.beyond, self.count)
    try:
        yield
    finally:
        plan.kept, plan.Parts.tables = own


def operator() -> tuple[Callable[[Tensor | None], object], Callable[[Tensor | None], object]]:
    """A forward, and a forward and backward, of cu_seqlens or None."""

    def zeros(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(1, LENGTH, *size, dtype=dtype, requires_grad=True)

    q, k, v = (zeros(HEADS, WIDTH) for _ in range(3))
    g, do = zeros(HEADS, SLOTS, dtype=torch.float32), torch.zeros(1, LENGTH, HEADS, WIDTH, dtype=torch.bfloat16)

    def forward(cu_seqlens: Tensor | None) -> object:
        with torch.no_grad():
            return attention(q, k, v, g, None, None, None, cu_seqlens, 1.0, False, False)

    def both(cu_seqlens: Tensor | None) -> object:
        o, *_ = attention(q, k, v, g, None, None, None, cu_seqlens, 1.0, False, False)
        return torch.autograd.grad(o, (q, k, v, g), do)

    return forward, both


def a_launch() -> Callable[[], object]:
    """A launch of 18 tensors, 3 absent ones and 5 numbers."""
    arguments = (*(torch.zeros(16) for _ in range(18)), None, None, None, 4096, 16, 8, 0.125, 1.0)
    constants = {f"C{i}": i for i in range(20)}
    names = (*(f"x{i}" for i in range(len(arguments))), *constants)
    kernel = SimpleNamespace(arg_names=names, fn=SimpleNamespace(__name__="idle"))
    variant = launching.Variant(kernel, constants, 4, 1, {})
    return lambda: launching.launch(variant, 4, arguments)


@contextmanager
def watched() -> Iterator[None]:
    """Within it launches are told to somebody, for which Triton's own way of launching is taken."""
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(_nothing)
    try:
        yield
    finally:
        hooks.remove(_nothing)


def _nothing(metadata: object) -> None:
    pass


def measure() -> dict[str, Any]:
    """Microseconds by what was called, and the launches of a forward and backward."""
    packed = torch.linspace(0, LENGTH, SEQUENCES + 1).to(torch.int32)
    forward, both = operator()

    def anew() -> object:
        plan._plans.clear()
        return both(packed)

    def microseconds(call: Callable[[], object]) -> float:
        call()
        return stopwatch.cost(call).seconds * 1e6

    stopwatch = Stopwatch(torch.device("cpu"), BUDGET, REPEATS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with idle_launches() as launched:
            both(None)
            launches = len(launched)
            found = {
                "forward": microseconds(lambda: forward(None)),
                "forward and backward": microseconds(lambda: both(None)),
                f"the same of {SEQUENCES} packed sequences": microseconds(lambda: both(packed)),
                "the same, of boundaries not met before": microseconds(anew),
            }
            with as_on_the_device():
                found["the same, of boundaries on the device"] = microseconds(lambda: both(packed))
            found["a launch of 26 arguments and 20 constants"] = microseconds(a_launch())
            with watched():
                found["such a launch by Triton's `compiled[grid]`"] = microseconds(a_launch())
    finally:
        torch.set_num_threads(threads)
    return {"launches": launches, "microseconds": found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.partition(":")[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    result = {"about": about("python -m benchmarks.host", "cpu")} | measure()
    for name, value in result["microseconds"].items():
        print(f"{name:44s} {value:7.1f} µs")
    if given.output is not None:
        write(result, given.output)


if __name__ == "__main__":
    main()
