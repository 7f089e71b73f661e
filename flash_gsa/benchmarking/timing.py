"""How long a call takes and how much memory it needs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSHED_BYTES = 2**28
"""Written before each timed call on a GPU: more than any second-level cache, so that inputs come from memory."""

MOST_CALLS = 100


@dataclass(frozen=True)
class Cost:
    """Of one call: seconds are the median of all `calls`; `low` and `high` the medians of the repeats that differ most.

    `peak_bytes` is the memory in use at the worst moment, above what was in use before the call; None on a CPU.
    """

    seconds: float
    low: float
    high: float
    calls: int
    peak_bytes: int | None = None


class Stopwatch:
    """Times calls on one device.

    Args:
        device: where the calls run. On a GPU the time is that between two events in the stream, so launches are
            overlapped as in use; on a CPU it is that of a clock.
        budget: seconds of timed calls in one measurement, about.
        repeats: how often a measurement is made anew within the budget, to show the spread.

    Backwards run in the calling thread. Otherwise a backward on a GPU is handed to a thread of autograd's and back,
    once however deep the model is; that took 300 µs on a virtual machine, more than the operator's own share.
    """

    def __init__(self, device: torch.device, budget: float, repeats: int):
        self.device, self.budget, self.repeats = device, budget, repeats
        on_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device) if on_gpu else None

    def cost(self, call: Callable[[], object], flush: bool = True) -> Cost:
        """The cost of `call`, which has run before, so that nothing is left to compile.

        The first call warms up. Where the second, too, takes longer than the budget, it is the one that counts.
        """
        self._synchronize()
        before = self._start_memory()
        (first,) = self._times(call, 1, flush)
        if first > self.budget:  # a library may have set itself up
            (first,) = self._times(call, 1, flush)
        if first > self.budget:
            return Cost(first, first, first, 1, self._peak_memory(before))
        for _ in range(2):
            (first,) = self._times(call, 1, flush)
        calls = max(1, min(MOST_CALLS, int(self.budget / self.repeats / max(first, 1e-7))))
        rounds = [self._times(call, calls, flush) for _ in range(self.repeats)]
        medians = [statistics.median(times) for times in rounds]
        every = [seconds for times in rounds for seconds in times]
        peak = self._peak_memory(before)
        return Cost(statistics.median(every), min(medians), max(medians), len(every), peak)

    def _times(self, call: Callable[[], object], calls: int, flush: bool) -> list[float]:
        if self._flushed is None:
            ticks = []
            for _ in range(calls):
                began = time.perf_counter()
                call()
                ticks.append(time.perf_counter() - began)
            return ticks
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
        with torch.autograd.set_multithreading_enabled(False):
            for start, end in zip(starts, ends, strict=True):
                if flush:
                    self._flushed.zero_()
                start.record()
                call()
                end.record()
        self._synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]

    def _synchronize(self) -> None:
        if self._flushed is not None:
            torch.cuda.synchronize(self.device)

    def _start_memory(self) -> int:
        if self._flushed is None:
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak_memory(self, before: int) -> int | None:
        if self._flushed is None:
            return None
        return torch.cuda.max_memory_allocated(self.device) - before


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as a CUDA graph, so that launches cost nothing; on a CPU `run` itself."""
    if device.type != "cuda":
        run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Any = kept) -> None:
        graph.replay()

    replay()
    return replay
