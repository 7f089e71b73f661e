"""How far decoding drifts from the exact recurrence, token after token, by the format the state is kept in.

A state in bfloat16 is rounded at every token. What that costs depends on how long a slot remembers: of a slot that
keeps what it holds for n tokens, a token changes about the n-th part, and what is less than half a unit in the last
place is lost. So every head here has slots of one memory span.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.ops import gated_slot_attention, gated_slot_attention_step
from flash_gsa.ops.registry import State

from .about import about, write
from .measurements import open_device

Record = dict[str, Any]

SPANS = (10, 100, 1_000, 10_000, 100_000)
"""Tokens after which a slot has kept e^-1 of what it held: one head each."""
WIDTH, SLOTS = 64, 64
AT_ONCE = 4096
"""Tokens made at a time, so that memory does not grow with the steps."""
STATES = (torch.float32, torch.bfloat16)


def measure_drift(
    steps: int,
    output: Path | None = None,
    device: str = "auto",
    command: str = "flash_gsa.benchmarking.drift.measure_drift",
    commit: str | None = None,
    say: Callable[[str], None] = print,
) -> Record:
    """Decode `steps` tokens with states in every format beside the recurrence in float64.

    Inputs are bfloat16 numbers, q, k, v those of SiLU of normal ones; g = -e^x / span with x normal, another at every
    token and slot.

    Args:
        steps: tokens, at least 1.
        output: JSON file, written anew at every power of ten.
        device: "auto", "cpu", "cuda" or "cuda:N".
        command, commit: what the result says of itself.
        say: gets a line at every power of ten.

    Returns:
        `about`; the sizes; `rows` of a state's format, a head's `span` and a number of `steps`, with the error
        ‖x - y‖ / ‖y‖ of the `output`, over the last tenth of these steps, and of both `states` after them; the
        `seconds` of decoding.

    Raises:
        UsageError: the device is not there, there are no steps, or the file cannot be written.
    """
    if steps < 1:
        raise UsageError(f"steps: expected at least 1, got {steps}")
    place = open_device(device)
    exact = _zeros(torch.float64, place)
    states = {dtype: _zeros(dtype, place) for dtype in STATES}
    outputs: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in (torch.float64, *STATES)}
    result: Record = {
        "about": about(command, str(place), commit),
        "shape": {"B": 1, "H": len(SPANS), "K": WIDTH, "V": WIDTH, "M": SLOTS},
        "rows": [],
        "seconds": {_name(dtype): 0.0 for dtype in STATES},
    }
    done = 0
    for x, here in _tokens(steps, place):
        o, after = gated_slot_attention(
            *(y.double() for y in x), initial_state=exact, output_final_state=True, backend="chunk"
        )
        assert after is not None
        exact = after
        outputs[torch.float64].append(o[0])
        for dtype in STATES:
            began = time.perf_counter()
            outputs[dtype].append(_decode(x, states[dtype]))
            _wait(place)
            result["seconds"][_name(dtype)] += time.perf_counter() - began
        done += x[0].shape[1]
        if here:
            rows = [row for dtype in STATES for row in _errors(dtype, done, outputs, states[dtype], exact)]
            result["rows"] += rows
            say(f"{done:,} steps: {_told(rows)}")
            if output is not None:
                write(result, output)
        # Of the outputs only the last tenth counts.
        outputs = {dtype: [torch.cat(kept)[-(steps // 10 + 1) :]] for dtype, kept in outputs.items()}
    return result


def _tokens(steps: int, device: torch.device) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """(q, k, v, g) of one stretch after the other, and whether a power of ten or the end is reached with it."""
    generator = torch.Generator(device).manual_seed(0)
    stops = [10**i for i in range(len(str(steps))) if 10**i < steps] + [steps]
    spans = torch.tensor(SPANS, dtype=torch.float32, device=device)[:, None]
    done = 0
    for stop in stops:
        while done < stop:
            length = min(AT_ONCE, stop - done)

            def normal(width: int, length: int = length) -> Tensor:
                return torch.randn(1, length, len(SPANS), width, generator=generator, device=device)

            q, k, v = (torch.nn.functional.silu(normal(WIDTH)).bfloat16() for _ in range(3))
            done += length
            yield (q, k, v, -normal(SLOTS).exp() / spans), done == stop


def _zeros(dtype: torch.dtype, device: torch.device) -> State:
    heads = len(SPANS)
    return (
        torch.zeros(1, heads, WIDTH, SLOTS, dtype=dtype, device=device),
        torch.zeros(1, heads, SLOTS, WIDTH, dtype=dtype, device=device),
    )


@torch.no_grad()
def _decode(x: tuple[Tensor, ...], state: State) -> Tensor:
    """o [T, H, V] in float64, token by token; the state is updated in place."""
    outputs = []
    for t in range(x[0].shape[1]):
        o, _ = gated_slot_attention_step(*(y[:, t] for y in x), state=state, in_place=True)
        outputs.append(o[0])
    return torch.stack(outputs).double()


def _errors(
    dtype: torch.dtype, steps: int, outputs: dict[torch.dtype, list[Tensor]], state: State, exact: State
) -> list[Record]:
    window = max(1, steps // 10)
    found, wanted = (torch.cat(outputs[one])[-window:] for one in (dtype, torch.float64))
    both = [torch.cat([y.double().flatten(2) for y in pair], dim=2)[0] for pair in (state, exact)]
    return [
        {
            "state": _name(dtype),
            "span": span,
            "steps": steps,
            "output": _distance(found[:, head], wanted[:, head]),
            "states": _distance(both[0][head], both[1][head]),
        }
        for head, span in enumerate(SPANS)
    ]


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _told(rows: list[Record]) -> str:
    parts = []
    for name in dict.fromkeys(row["state"] for row in rows):
        worst = max((row for row in rows if row["state"] == name), key=lambda row: row["output"])
        parts.append(f"state in {name}: o off by at most {worst['output']:.2%} (span {worst['span']:,})")
    return "; ".join(parts)
