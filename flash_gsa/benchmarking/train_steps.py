"""Training steps on one device, and what they cost: seconds by part, memory, the first step.

    loss = model(tokens)  →  gradients  →  AdamW  →  gradients dropped

The batch is the same at every step, random tokens of one sequence a row. Gradients are not clipped.
"""

import getpass
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .measurements import open_device, synchronize
from .power import metered
from .timing import captured
from .train_models import SIZES, TRAINED, Size, Trained
from .tuning import compiled_in_parallel

PRECISIONS = ("pure_bf16", "bf16", "fp32")
PARTS = ("forward", "backward", "optimizer")
WARM_UP = 2
"""Steps after the first, before the first that is timed."""


@dataclass(frozen=True)
class Job:
    """What is run: `implementation` in its `variant`, the model's `size` by name, `rows` of `length` tokens a step.

    precision: "pure_bf16", weights, gradients and moments in bfloat16; "bf16", these in float32 and products in
    bfloat16; "fp32".
    """

    implementation: str
    variant: str
    size: str
    rows: int
    length: int
    precision: str

    @property
    def label(self) -> str:
        """For people: "ours compiled, 8x2048"."""
        return f"{self.implementation} {self.variant}, {self.rows}x{self.length}"


class Training:
    """A model, its optimiser and a batch.

    `loss` is that of the last step.
    """

    def __init__(self, job: Job, device: torch.device):
        self.job, self.device = job, device
        self.who, self.size = TRAINED[job.implementation], SIZES[job.size]
        self.model: nn.Module = built(self.who, self.size, job, device)
        self.loss: Tensor | None = None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True, capturable=job.variant == "graph"
        )
        random = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.size.vocabulary, (job.rows, job.length), generator=random)
        self.tokens = tokens.to(device)

    def step(self, mark: Callable[[], None] = lambda: None) -> None:
        """One step; `mark` is called before it and after each of PARTS."""
        mark()
        with autocast(self.job.precision, self.device):
            forwarded = self.who.forward(self.model, self.tokens)
            loss = self.who.loss(self.model, forwarded, self.tokens)
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        mark()


def built(who: Trained, size: Size, job: Job, device: torch.device, **settings: Any) -> nn.Module:
    """A model in training, with weights in the format of the job's precision, compiled if the job says so."""
    torch.compiler.reset()  # for a second length torch.compile would make code for any length
    torch.manual_seed(0)
    with device:
        model = who.build(who.config(size, job.variant, **settings)).train()
    in_format(model, weight_format(job.precision))
    if job.variant == "compiled":
        who.compile(model)
    return model


def in_format(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in this format; buffers, such as the angles of rotations, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def weight_format(precision: str) -> torch.dtype:
    """Of weights, gradients and moments."""
    return torch.bfloat16 if precision == "pure_bf16" else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


class Clock:
    """Moments in a device's stream, at each call of `mark`."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._moments: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def since(self, first: int, count: int) -> list[float]:
        """Seconds between `count` moments from number `first` on; the device has to be waited for before."""
        moments = self._moments[first : first + count]
        if self._on_gpu:
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(moments)]
        return [b - a for a, b in pairwise(moments)]


def measure_first_step(device: str, job: Job) -> dict[str, Any]:
    """Seconds to build the model, and of its first step, in a process that has not run it before."""
    place = open_device(device)
    return first_step(job, place)[1]


def measure_steps(device: str, job: Job, steps: int) -> dict[str, Any]:
    """The first step, then the median of `steps` after a warm-up, by parts, and the memory they need."""
    place = open_device(device)
    if reason := TRAINED[job.implementation].reason_against(place):
        return {"problem": f"not run: {reason}"}
    if job.variant == "graph" and place.type != "cuda":
        return {"problem": "not run: CUDA graphs need a GPU"}
    training, record = first_step(job, place)
    record |= {"backend": backend(training), "parameters": sum(p.numel() for p in training.model.parameters())}
    on_gpu, whole = place.type == "cuda", job.variant == "graph"
    if on_gpu:  # what was needed once, to tune or compile, does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
    clock = Clock(place)
    step = _whole(training, clock) if whole else lambda: training.step(clock.mark)
    for _ in range(WARM_UP):
        step()
    synchronize(place)
    with metered(place) as power:
        for _ in range(steps):
            step()
        synchronize(place)
    marks = 2 if whole else len(PARTS) + 1
    seconds = [clock.since(i * marks, marks) for i in range(WARM_UP, WARM_UP + steps)]
    record |= _cost([sum(parts) for parts in seconds], job) | ({"power": power} if power else {})
    if not whole:
        record["parts"] = {name: statistics.median(p[i] for p in seconds) for i, name in enumerate(PARTS)}
    if on_gpu:
        record["peak_bytes"] = torch.cuda.max_memory_allocated(place)
        record["reserved_bytes"] = torch.cuda.max_memory_reserved(place)
    return record | _losses(record["first_loss"], training)


def _whole(training: Training, clock: Clock) -> Callable[[], None]:
    """A step as one CUDA graph, between two marks."""
    replay = captured(training.step, training.device)

    def step() -> None:
        clock.mark()
        replay()
        clock.mark()

    return step


def _losses(first: float, training: Training) -> dict[str, Any]:
    assert training.loss is not None
    last = float(training.loss)
    if math.isfinite(last) and last < first:
        return {"last_loss": last}
    return {"last_loss": repr(last), "problem": f"wrong: the loss did not fall, from {first:.4f} to {last:.4f}"}


def first_step(job: Job, place: torch.device) -> tuple[Training, dict[str, Any]]:
    """What has taken one step, and the record of it: seconds, caches, the loss."""
    found = {"caches": caches()}
    start = time.perf_counter()
    training = Training(job, place)
    synchronize(place)
    built = time.perf_counter()
    with compiled_in_parallel():
        training.step()
    synchronize(place)
    assert training.loss is not None
    seconds = {"build_seconds": built - start, "first_step_seconds": time.perf_counter() - built}
    return training, {"problem": None, **seconds, **found, "first_loss": float(training.loss)}


def _cost(times: list[float], job: Job) -> dict[str, Any]:
    """Of a step: the median, the lowest and the highest; rates."""
    seconds, tokens = statistics.median(times), job.rows * job.length
    flops = SIZES[job.size].training_flops(TRAINED[job.implementation].mixer, job.length)
    return {
        "seconds": seconds,
        "low": min(times),
        "high": max(times),
        "steps": len(times),
        "tokens_per_second": tokens / seconds,
        "flops_per_token": flops,
        "flops_per_second": flops * tokens / seconds,
    }


def caches() -> dict[str, str]:
    """Whether compiled code of earlier processes lies where this one looks for it: "empty" or "filled"."""
    folders = {
        "triton": os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache",
        "inductor": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}",
    }
    return {name: "filled" if _has_entries(Path(folder)) else "empty" for name, folder in folders.items()}


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def backend(training: Training) -> str | None:
    """Which backend of this package's operator runs in it; None for other packages."""
    from flash_gsa.ops import Problem, explain

    if training.job.implementation != "ours":
        return None
    size, job = training.size, training.job
    width = size.hidden // size.heads
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    shape = (job.rows, job.length, size.heads, size.heads, width, width, size.slots)
    problem = Problem(*shape, dtype, training.device.type)
    return next(name for name, reason in explain(problem) if reason is None)
