"""The measurements themselves: each function makes one record of a result file, in the process that has the device."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.ops import backend_names

from .about import about
from .gate import full_size_errors, gradient_of_o, small_errors, with_gradients
from .implementations import Implementation, Tensors, implementation, implementation_names, measured_dtype
from .power import metered
from .shapes import Shape
from .timing import Stopwatch, captured
from .tuning import compiled_in_parallel


def describe(device: str, command: str, commit: str | None) -> dict[str, Any]:
    """What is here: `about` it, the `device`, names of all `implementations`, of them the `backends` and `decoders`.

    The reference is no backend in this sense: it judges.
    """
    place = open_device(device)
    names = implementation_names()
    return {
        "about": about(command, str(place), commit),
        "device": str(place),
        "implementations": names,
        "backends": [name for name in backend_names() if name != "reference"],
        "decoders": [name for name in names if implementation(name).decodes],
    }


def open_device(name: str) -> torch.device:
    """The device called `name` ("auto": a GPU if there is one), made the current one.

    Raises:
        UsageError: there is none of that name.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["auto", "cpu", *(["cuda"] if there else []), *(f"cuda:{i}" for i in range(there))]
    if name not in known:
        raise UsageError(f"there is no device {name!r} here that torch can use; choose of {', '.join(known)}")
    if name == "cpu" or not there:
        return torch.device("cpu")
    device = torch.device("cuda", int(name.partition(":")[2] or 0))
    torch.cuda.set_device(device)
    return device


def measure_ceilings(device: str, copy_bytes: int, product_size: int, budget: float, repeats: int) -> dict[str, Any]:
    """The most this device does: a copy, bytes read and written, and a square matrix product as models need it."""
    stopwatch = Stopwatch(open_device(device), budget, repeats)
    return {"copy": _copy(stopwatch, copy_bytes), "product": _product(stopwatch, product_size)}


def _copy(stopwatch: Stopwatch, size: int) -> dict[str, Any]:
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=stopwatch.device)
    target = torch.empty_like(source)
    cost = stopwatch.cost(lambda: target.copy_(source))
    return asdict(cost) | {"bytes": 2 * size, "bytes_per_second": 2 * size / cost.seconds}


def _product(stopwatch: Stopwatch, size: int) -> dict[str, Any]:
    dtype = measured_dtype(stopwatch.device)
    a, b = (torch.randn(size, size, device=stopwatch.device).to(dtype) for _ in range(2))
    a @ b  # its library's start does not count among watts
    synchronize(stopwatch.device)
    with metered(stopwatch.device) as power:
        cost = stopwatch.cost(lambda: a @ b)
        synchronize(stopwatch.device)
    about_it: dict[str, Any] = {"power": power} if power else {}
    about_it |= {"size": size, "dtype": _dtype_name(dtype), "flops_per_second": 2 * size**3 / cost.seconds}
    return asdict(cost) | about_it


def measure_shape(
    device: str,
    name: str,
    shape: Shape,
    budget: float,
    repeats: int,
    full_gradients: bool,
    beside_auto: bool,
    in_graph: bool = False,
) -> dict[str, Any]:
    """Values, then time and memory of the forward, and of forward and backward, of one implementation.

    Args:
        full_gradients: check the gradients at the full size too, not only o and the final states.
        beside_auto: "auto" is measured as well, so that its backend need not be measured by name.
        in_graph: on a GPU also the times of both in a CUDA graph, as `in_graph` of the record: what the device takes
            when it never waits for launches. What cannot be captured has none, and `graph_problem` says why.
    """
    place, candidate = open_device(device), implementation(name)
    if reason := candidate.reason_against(shape, place):
        return {"problem": f"not run: {reason}"}
    backend = candidate.backend(shape, place)
    if beside_auto and backend is not None and backend == implementation("auto").backend(shape, place):
        return {"problem": "not run: it is what auto runs"}
    record: dict[str, Any] = {"backend": backend, "dtype": _dtype_name(measured_dtype(place))}

    x = candidate.inputs(shape, place)
    do = gradient_of_o(x, shape)
    start = time.perf_counter()
    # What tunes itself does so at its first call: here, at the size that is timed.
    with compiled_in_parallel():
        with_gradients(lambda y: candidate.forward(y, shape), x, do)
    synchronize(place)
    record["first_call_seconds"] = time.perf_counter() - start
    record |= _values(candidate, shape, place, full_gradients)
    if record["problem"]:
        return record

    def forward() -> Tensor:
        with torch.no_grad():
            return candidate.forward(x, shape)

    def both() -> Tensors:
        return with_gradients(lambda y: candidate.forward(y, shape), x, do)

    stopwatch = Stopwatch(place, budget, repeats)
    item = x["q"].element_size()
    for label, call, least in (
        ("forward", forward, shape.forward_bytes(item)),
        ("forward_backward", both, shape.both_bytes(item)),
    ):
        record[label] = asdict(stopwatch.cost(call)) | ({"least_bytes": least} if candidate.gated_slots else {})
    if in_graph and place.type == "cuda":
        add_graph(record, {"forward": forward, "forward_backward": both}, stopwatch, place)
    return record


def add_graph(
    record: dict[str, Any], calls: dict[str, Callable[[], Any]], stopwatch: Stopwatch, place: torch.device
) -> None:
    """Add the times of `calls` in CUDA graphs to the record, or why there are none: a call that waits, say."""
    try:
        costs = {label: stopwatch.cost(captured(call, place)) for label, call in calls.items()}
        record["in_graph"] = {label: asdict(replace(cost, peak_bytes=None)) for label, cost in costs.items()}
    except RuntimeError as error:
        record["graph_problem"] = str(error).splitlines()[0]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give back what earlier measurements left behind; raises if the device no longer answers."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _values(candidate: Implementation, shape: Shape, device: torch.device, gradients: bool) -> dict[str, Any]:
    """{"problem": None or "wrong: …", "errors": …, "full_size_errors": … or why there are none}."""
    errors = small_errors(candidate, shape, device)
    if errors.problem:
        return {"problem": f"wrong: {errors.problem} at a small size", "errors": errors.found}
    full = None
    for with_gradients_too in dict.fromkeys((gradients, False)):
        # The next attempt is outside of `except`, which would keep the memory of this one.
        with suppress(torch.OutOfMemoryError):
            full = full_size_errors(candidate, shape, device, with_gradients_too)
            break
    if full is None:
        return {"problem": None, "errors": errors.found, "full_size_errors": "not compared: out of memory in float64"}
    problem = f"wrong: {full.problem}" if full.problem else None
    return {"problem": problem, "errors": errors.found, "full_size_errors": full.found}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
