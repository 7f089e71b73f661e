"""What `flash-gsa bench tune` asks of a machine: compile kernels on its processor cores, time them on its GPU.

Whatever compiles, is timed or fails does so in processes of its own (`Worker`). Those that compile need no GPU: they
run a call on tensors without memory, and Triton's cache of compiled kernels is where the one that measures finds them.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.ops.triton.tiles import KERNELS, Tiles, using

from .about import about
from .gate import gradient_of_o, with_gradients
from .implementations import Tensors, layer_inputs
from .tune_candidates import Workload
from .worker import Failed, TookTooLong, Worker

Record = dict[str, Any]

FIELDS = {"states_forward": "states"} | {kernel: kernel for kernel in KERNELS if kernel != "states"}
"""Names of the kernels' functions, and of their tiles."""
TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}
"""How far results may lie apart, ‖x - y‖ / ‖y‖: several roundings; what wrong code makes is far beyond."""
COMPILE_LIMIT, MEASURE_LIMIT = 180.0, 120.0
"""Seconds after which one of them is given up."""
GRACE = 10.0
"""Seconds that what has begun may go on after the end: to begin another process would take as long."""
NO_TIME = "no time left"
WARM_UP, REPEATED = 5, 20
"""Milliseconds that a kernel runs before it is timed, and while it is."""


class Machine:
    """This machine. Use it as a context manager: at its end its processes are gone.

    Args:
        jobs: how many processes compile; None: one a processor core.

    Raises:
        UsageError: there is no CUDA device or no Triton here.
    """

    def __init__(self, jobs: int | None = None):
        if not torch.cuda.is_available():
            raise UsageError("bench tune measures kernels on a CUDA device and found none; run it where there is one")
        if find_spec("triton") is None:
            raise UsageError("bench tune measures Triton kernels, and triton is not installed (pip install triton)")
        self._timer = Worker()
        self._compilers = [Worker() for _ in range(jobs or os.cpu_count() or 1)]

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *rest: object) -> None:
        for worker in (self._timer, *self._compilers):
            worker.stop()

    @property
    def jobs(self) -> int:
        return len(self._compilers)

    def describe(self, command: str, commit: str | None) -> Record:
        """`about`, the `architecture`, the most `shared_bytes` of a program, and the `target` to compile for.

        Meanwhile the processes that compile get ready.
        """
        threads = self._in_all(lambda worker: _called(worker, MEASURE_LIMIT, float("inf"), get_ready))
        here = self._timer.call(describe, command, commit, limit=MEASURE_LIMIT)
        for thread in threads:
            thread.join()
        return here

    def compile(self, tasks: Sequence[tuple[Any, ...]], until: float) -> list[Record]:
        """`compile_kernel` of all tasks, as many at once as there are processes; none begins after `until`."""
        records: list[Record] = [{"problem": NO_TIME} for _ in tasks]
        queue, interrupted = deque(enumerate(tasks)), threading.Event()

        def serve(worker: Worker) -> None:
            try:
                while time.monotonic() < until:
                    i, task = queue.popleft()
                    records[i] = _called(worker, COMPILE_LIMIT, until, compile_kernel, *task)
            except IndexError:  # none is left
                return
            except Exception:  # a worker that was ended while it was waited for
                if not interrupted.is_set():
                    raise

        threads = self._in_all(serve)
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            interrupted.set()
            queue.clear()
            raise
        return records

    def _in_all(self, serve: Callable[[Worker], Any]) -> list[threading.Thread]:
        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in self._compilers]
        for thread in threads:
            thread.start()
        return threads

    def time_kernel(self, *task: Any, until: float) -> Record:
        """`time_kernel` in the process that measures."""
        return _called(self._timer, MEASURE_LIMIT, until, time_kernel, *task)

    def time_whole(self, *task: Any, until: float) -> Record:
        """`time_whole` in the process that measures."""
        return _called(self._timer, MEASURE_LIMIT, until, time_whole, *task)


def _called(worker: Worker, limit: float, until: float, function: Callable[..., Record], *task: Any) -> Record:
    left = until - time.monotonic()
    if left <= 0:
        return {"problem": NO_TIME}
    try:
        return worker.call(function, *task, limit=min(limit, left + GRACE))
    except TookTooLong as failure:
        return {"problem": NO_TIME if left + GRACE < limit else str(failure)}
    except Failed as failure:
        return {"problem": str(failure)}


def get_ready() -> Record:
    """Import what compiling needs."""
    from flash_gsa.ops.triton import library  # noqa: F401

    return {"problem": None}


def describe(command: str, commit: str | None) -> Record:
    """See `Machine.describe`; in the process that measures."""
    from triton.runtime import driver

    device = torch.cuda.current_device()
    target = driver.active.get_current_target()
    return {
        "about": about(command, f"cuda:{device}", commit),
        "architecture": torch.cuda.get_device_capability(device),
        "shared_bytes": driver.active.utils.get_device_properties(device)["max_shared_mem"],
        "target": (target.backend, target.arch, target.warp_size),
    }


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its function's name, how to launch it again, and what was compiled."""

    name: str
    again: Callable[[], Any]
    compiled: Any


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it, every launch of one of the passes' kernels is noted, whichever thread it comes from."""
    from flash_gsa.ops.triton import launching

    launch, launches = launching.launch, []

    def note(variant: launching.Variant, programs: int, arguments: tuple) -> Any:
        compiled = launch(variant, programs, arguments)
        if not arguments[0].is_meta:  # a rehearsal's only compile
            launches.append(Launch(variant.kernel.fn.__name__, partial(launch, variant, programs, arguments), compiled))
        return compiled

    launching.launch = note
    try:
        yield launches
    finally:
        launching.launch = launch


def time_kernel(workload: Workload, tiles: Tiles, kernel: str, reference: Tiles) -> Record:
    """`seconds` of all launches of `kernel` in one call under `tiles`; what it takes; its results' `distance`.

    They are compared with those under `reference`, and there is no time of what is wrong.
    """
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    with using(workload.tiles(tiles)), recorded() as launches:
        found = _results(workload, device)
    distance = _distance(found, _reference(workload, reference, device))
    mine = [launch for launch in launches if FIELDS.get(launch.name) == kernel]
    record: Record = {
        "distance": distance,
        "registers": max(launch.compiled.n_regs for launch in mine),
        "spills": max(launch.compiled.n_spills for launch in mine),
        "shared_bytes": max(launch.compiled.metadata.shared for launch in mine),
    }
    if not distance <= TOLERANCE[workload.precision]:
        return record | {"problem": f"wrong: {distance:.1e} from the others"}
    del found

    def again() -> None:
        for launch in mine:
            launch.again()

    milliseconds = do_bench(again, warmup=WARM_UP, rep=REPEATED, return_mode="median")
    return record | {"problem": None, "seconds": milliseconds / 1e3}


def time_whole(workload: Workload, tiles: Tiles) -> Record:
    """Seconds of `forward` and of `forward_backward` under `tiles`, and the `peak_bytes` of the latter."""
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    x, _ = _inputs(workload, device)

    def forward() -> Tensor:
        with torch.no_grad():
            return _forward(workload, x)

    record: Record = {"problem": None}
    with using(workload.tiles(tiles)):
        _results(workload, device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _results(workload, device)
        record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        for name, call in (("forward", forward), ("forward_backward", lambda: _results(workload, device))):
            record[name] = do_bench(call, warmup=2 * WARM_UP, rep=3 * REPEATED, return_mode="median") / 1e3
    return record


class _NoDevice:
    """What Triton asks of a device's driver in order to compile for it."""

    def __init__(self, target: tuple[str, int, int]):
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self.target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_kernel(target: tuple[str, int, int], workload: Workload, tiles: Tiles, wanted: str) -> Record:
    """Compile `wanted` as a call under `tiles` launches it: the `shared_bytes` it takes. In a process without a GPU."""
    from triton.runtime import driver

    from flash_gsa.ops.triton import launching

    driver.set_active(_NoDevice(target))
    launch, compiled = launching.launch, []

    def compile_only(variant: launching.Variant, programs: int, arguments: tuple) -> None:
        if FIELDS.get(variant.kernel.fn.__name__) == wanted:
            compiled.append(variant.kernel.run(*arguments, grid=(programs,), warmup=True, **variant.told))

    launching.launch = compile_only
    start = time.perf_counter()
    try:
        with using(workload.tiles(tiles)):
            _results(workload, torch.device("meta"))
    finally:
        launching.launch = launch
    shared = max(one.metadata.shared for one in compiled)
    return {"problem": None, "shared_bytes": shared, "compile_seconds": time.perf_counter() - start}


@lru_cache(maxsize=2)
def _inputs(workload: Workload, device: torch.device) -> tuple[Tensors, Tensor]:
    """(q, k, v, g, the gradient of o)."""
    shape = workload.shape
    if device.type == "meta":
        sizes = {"q": (shape.HQ, shape.K), "k": (shape.H, shape.K), "v": (shape.H, shape.V), "g": (shape.H, shape.M)}
        x = {name: torch.empty(shape.B, shape.T, *size, device=device) for name, size in sizes.items()}
        do = torch.empty(shape.B, shape.T, shape.HQ, shape.V, device=device)
    else:
        x = layer_inputs(shape, device)
        do = gradient_of_o(x, shape)
    return {name: y if name == "g" else y.to(workload.dtype) for name, y in x.items()}, do.to(workload.dtype)


def _forward(workload: Workload, x: Tensors) -> Tensor:
    from flash_gsa.ops.triton.library import attention, linear_attention

    q, k, v, g = (x[name] for name in "qkvg")
    if workload.linear:
        return linear_attention(q, k, v, g, None, None, 1.0, False)[0]
    return attention(q, k, v, g, None, None, None, None, 1.0, False, False)[0]


def _results(workload: Workload, device: torch.device) -> Tensors:
    x, do = _inputs(workload, device)
    return with_gradients(partial(_forward, workload), x, do)


@lru_cache(maxsize=2)
def _reference(workload: Workload, tiles: Tiles, device: torch.device) -> Tensors:
    with using(workload.tiles(tiles)):
        return _results(workload, device)


def _distance(found: Tensors, wanted: Tensors) -> float:
    """The largest ‖x - y‖ / ‖y‖ among results; not a number where one is not."""
    return max(
        (
            float((x.double() - wanted[name].double()).norm() / wanted[name].double().norm())
            for name, x in found.items()
        ),
        key=lambda distance: (distance != distance, distance),
    )
