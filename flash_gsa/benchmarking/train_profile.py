"""Which kernels a training step of ours spends its time in: what to make faster next.

Each part of a step is profiled by itself, so that every kernel belongs to one: forward (without the loss), loss,
backward, optimizer. In this package the loss computes its gradient, too: most of its backward is in the part "loss".
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measurements import open_device, synchronize
from .train_steps import WARM_UP, Job, Training, autocast

PHASES = ("forward", "loss", "backward", "optimizer")
STEPS = 2
LEAST_SHARE = 1e-3
"""Kernels with less of the time are not listed; they count in their category."""

PRODUCTS = r"gemm|nvjet|cutlass|cublas|splitk|sm\d+_xmma|aten::(mm|addmm|bmm)$"
OPERATOR = r"^(prepare|states_forward|outputs|values_backward|states_backward|inputs_backward|gates_backward)\b"
CATEGORIES: tuple[tuple[str, str, str], ...] = (
    ("loss, products", "loss", PRODUCTS),
    ("loss, the rest", "loss", ""),
    ("optimizer", "optimizer", ""),
    ("products", "", PRODUCTS),
    ("operator", "", OPERATOR),
    ("around the operator", "", r"^(silu|gates|norm)_(forward|backward)\b"),
    ("compiled by Inductor", "", r"^triton_"),
    ("between an MLP's products", "", r"^swiglu_(forward|backward)\b"),
    ("norms", "", r"^add_norm_(forward|backward)\b|rms_?norm|layer_?norm|GammaBeta|RMSNorm"),
    ("copies and fills", "", r"memcpy|memset|copy|fill"),
    ("elementwise", "", r"elementwise|reduce|aten::"),
    ("other", "", ""),
)
"""(category, part of the step or "" for any, pattern in a kernel's name); the first that fits holds.

The operator, what surrounds it, what is between an MLP's products, and some of the norms are this package's Triton
kernels by their names; `gates_backward`, which both have, counts with the operator.
"""


def measure_profile(device: str, job: Job) -> dict[str, Any]:
    """Milliseconds a step by kernel and by category, from the profiler; those of a whole step without it beside them.

    Returns:
        `milliseconds` of a step by the clock, `kernel_milliseconds` of it in kernels; of these `phases` {phase:
        milliseconds}, and by falling time `categories` and `kernels`, each with calls a step, milliseconds and share;
        of kernels those with LEAST_SHARE. On a CPU operations of PyTorch take the place of kernels.
    """
    place = open_device(device)
    training = Training(job, place)
    for _ in range(1 + WARM_UP):
        training.step()
    synchronize(place)
    start = time.perf_counter()
    for _ in range(STEPS):
        training.step()
    synchronize(place)
    seconds = (time.perf_counter() - start) / STEPS
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for _ in range(STEPS):
        for phase, run in zip(PHASES, _phases(training), strict=True):
            for name, calls, microseconds in _kernels(run, place):
                found = spent[phase, name]
                found[0] += calls / STEPS
                found[1] += microseconds / 1e3 / STEPS
    return {"problem": None, "milliseconds": 1e3 * seconds} | grouped(dict(spent))


def grouped(spent: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """The tables of `measure_profile` from {(phase, kernel): (calls, milliseconds)} of a step."""
    total = sum(milliseconds for _, milliseconds in spent.values())
    kernels: list[dict[str, Any]] = []
    by_category: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    phases = dict.fromkeys(PHASES, 0.0)
    for (phase, name), (calls, milliseconds) in spent.items():
        kind = category(phase, name)
        kernels.append({"name": name[:160], "phase": phase, "category": kind} | _row(calls, milliseconds, total))
        by_category[kind][0] += calls
        by_category[kind][1] += milliseconds
        phases[phase] += milliseconds
    categories: list[dict[str, Any]] = [
        {"category": name} | _row(calls, milliseconds, total) for name, (calls, milliseconds) in by_category.items()
    ]
    return {
        "kernel_milliseconds": total,
        "phases": phases,
        "categories": sorted(categories, key=lambda row: -row["milliseconds"]),
        "kernels": sorted((k for k in kernels if k["share"] >= LEAST_SHARE), key=lambda row: -row["milliseconds"]),
    }


def category(phase: str, kernel: str) -> str:
    """The category of a kernel, by CATEGORIES."""
    return next(
        name for name, of, pattern in CATEGORIES if of in ("", phase) and re.search(pattern, kernel, re.IGNORECASE)
    )


def _row(calls: float, milliseconds: float, total: float) -> dict[str, float]:
    return {"calls": calls, "milliseconds": milliseconds, "share": milliseconds / total if total else 0.0}


def _phases(training: Training) -> tuple[Callable[[], None], ...]:
    """The parts of a step, to be run in this order."""
    held: dict[str, Any] = {}

    def forward() -> None:
        with autocast(training.job.precision, training.device):
            held["hidden"] = training.who.forward(training.model, training.tokens)

    def loss() -> None:
        with autocast(training.job.precision, training.device):
            held["loss"] = training.who.loss(training.model, held.pop("hidden"), training.tokens)

    def backward() -> None:
        held.pop("loss").backward()

    def optimizer() -> None:
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    return forward, loss, backward, optimizer


def _kernels(run: Callable[[], None], device: torch.device) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) of all that ran on the device."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        run()
        synchronize(device)
    return [
        (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in seen.key_averages()
        if event.device_type.name == device.type.upper() and not event.is_user_annotation
    ]
