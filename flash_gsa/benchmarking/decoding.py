"""One decoding step, without what it costs to launch it, beside the copy of the state that it cannot do without."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from flash_gsa.ops.reference import reference_step

from .gate import Errors, compare, in_precision
from .implementations import Implementation, Tensors, implementation
from .measurements import open_device
from .shapes import Shape
from .timing import Cost, Stopwatch, captured

MOST_STEPS = 128
"""Steps run one after the other in one timed call, at most."""


def measure_decoding(
    device: str, name: str, shape: Shape, state: str, budget: float, repeats: int, rotated_bytes: int
) -> dict[str, Any]:
    """One token of `shape.B` sequences by one implementation; "copy": the copy of their states instead.

    Args:
        state: the format of states, "float32" or "bfloat16".
        rotated_bytes: states read and written by as many steps as make so many bytes, so that they come from memory
            and not from a cache.
    """
    place = open_device(device)
    dtype: torch.dtype = getattr(torch, state)
    state_bytes = dtype.itemsize * shape.state_numbers
    record: dict[str, Any] = {"state_bytes": state_bytes}
    steps = max(1, min(MOST_STEPS, rotated_bytes // (2 * state_bytes)))

    def some_states() -> list[Tensor]:
        return [torch.randn(shape.state_numbers, device=place, dtype=dtype) for _ in range(steps)]

    if name == "copy":
        states, targets = some_states(), some_states()

        def run() -> Any:
            for source, target in zip(states, targets, strict=True):
                target.copy_(source)

    else:
        candidate = implementation(name)
        if reason := candidate.reason_against(shape, place):
            return record | {"problem": f"not run: {reason}"}
        errors = _step_errors(candidate, replace(shape, B=2), place, dtype)
        record |= {"backend": candidate.backend(shape, place), "errors": errors.found}
        if errors.problem:
            return record | {"problem": f"wrong: {errors.problem}"}
        states = some_states()
        x = candidate.token_inputs(shape, place)

        def run() -> Any:
            # The results are kept to the end, so that no two steps write to one place.
            return [candidate.step(x, candidate.state(numbers, shape)) for numbers in states]

    with torch.no_grad():
        cost = Stopwatch(place, budget, repeats).cost(captured(run, place), flush=False)
    each = Cost(cost.seconds / steps, cost.low / steps, cost.high / steps, cost.calls)
    return record | asdict(each)


def _step_errors(candidate: Implementation, shape: Shape, device: torch.device, state: torch.dtype) -> Errors:
    x = candidate.token_inputs(shape, device)
    random = torch.Generator(device).manual_seed(2)
    start = torch.randn(shape.state_numbers, generator=random, device=device, dtype=state)
    token = {name: y[:, 0] for name, y in x.items()}

    def define(dtype: torch.dtype) -> Tensors:
        y = in_precision(token, dtype)
        hk, hv = (part.to(dtype) for part in candidate.state(start, shape))
        return _named(reference_step(y["q"], y["k"], y["v"], y["g"], y.get("s"), (hk, hv), 1.0))

    got = _named(candidate.step(x, candidate.state(start.clone(), shape)))
    return compare(got, define(torch.float64), define(torch.float32))


def _named(step: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensors:
    return {"o": step[0], "hk": step[1][0], "hv": step[1][1]}
