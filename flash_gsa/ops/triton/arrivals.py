"""How programs of one launch meet: a counter a group, and who owns the counters.

The P programs of a group each add PER_MEETING / P to their counter and wait until it has grown by PER_MEETING. A
counter therefore stands at a multiple of PER_MEETING between launches, whatever P was, and is never reset: the next
launch, or the next replay of a captured one, goes on from there. It may wrap; only differences are looked at.

Or none of them waits, and the one that finds the others' share in the counter does what is left to do (`is_last`).
Then nothing below about waiting matters, only who owns the counters.

Waiting ends only if every program of a group gets onto the chip while others of it wait there. Launchers split groups
only while the whole grid fits at once; kernels beside it that end by themselves only delay it. Several launches that
wait can fill the chip together (or less of it is there than the device says, under MPS). Then it matters that
programs start in the order of their numbers, as they do on NVIDIA hardware: of each launch only the last group that
has begun can be incomplete, so it needs room for no more than one group a launch.

A launch must own its counters until it ends. Launches of one stream follow each other and share one set. A captured
launch may be replayed on any stream, beside replays of others, so each gets a set of its own, for good; replays of one
graph follow each other. Sets come from a store that is zeroed once a device. Where there is none, because the first
launch of all is being captured, or it is used up, the launch zeroes a set of its own first: right, but a second launch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest P; a power of two, so that counters stay multiples of it when they wrap.
PER_MEETING = 64
STORE = 1 << 20  # counters a device (4 MiB): graphs of 24 layers with 128 groups each, 341 of them
A_STREAM = 1024  # counters a stream


@triton.jit
def arrive(counter, P: tl.constexpr, PER_MEETING: tl.constexpr):
    """Tell the other P - 1 programs of the group that what this one stored until here can be loaded.

    Returns what the counter will have reached when all have said so.
    """
    # One thread counts for all: the stores of the others must lie before that.
    tl.debug_barrier()
    before = tl.atomic_add(counter, PER_MEETING // P, sem="acq_rel", scope="gpu")
    return (before & -PER_MEETING) + PER_MEETING


@triton.jit
def wait(counter, goal):
    """Wait until the counter has reached `goal`; then what the group stored before it arrived can be loaded."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") - goal < 0:
        pass
    # One thread has seen it: the loads of the others must lie after that.
    tl.debug_barrier()


@triton.jit
def is_last(counter, P: tl.constexpr, PER_MEETING: tl.constexpr):
    """Say the same and wait for nobody: whether all others had said so before, and what they stored can be loaded."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, PER_MEETING // P, sem="acq_rel", scope="gpu")
    # One thread knows it: the loads of the others must lie after that.
    tl.debug_barrier()
    return (before & (PER_MEETING - 1)) == PER_MEETING - PER_MEETING // P


def meeting_place(groups: int, numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For one launch on the current stream of `device`, the current device: room for what its programs tell each
    other, `numbers` of float32 with anything in them, and a counter a group."""
    return torch.empty(numbers, dtype=torch.float32, device=device), _counters(groups, device)


def _counters(groups: int, device: torch.device) -> Tensor:
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _stores and not capturing:
        _stores.setdefault(device, Store(_zeros(device)))
    found = None
    if device in _stores:
        store = _stores[device]
        found = store.take(groups) if capturing else store.of_stream(torch.cuda.current_stream().cuda_stream)
    if found is None or found.numel() < groups:
        return torch.zeros(groups, dtype=torch.int32, device=device)
    return found


class Store:
    """Zeroed int32 counters of one device, handed out once each."""

    def __init__(self, counters: Tensor):
        self._counters = counters
        self._used = 0
        self._of_stream: dict[int, Tensor | None] = {}
        self._lock = threading.Lock()

    def take(self, count: int) -> Tensor | None:
        """At least `count` counters that nobody else has, or None if too few are left."""
        with self._lock:
            start, end = self._used, self._used + triton.cdiv(count, 8) * 8  # sets share no sector of 32 bytes
            if end > self._counters.numel():
                return None
            self._used = end
            return self._counters[start:end]

    def of_stream(self, stream: int) -> Tensor | None:
        """The counters of all launches on one stream, or None if too few were left."""
        if stream not in self._of_stream:
            self._of_stream[stream] = self.take(A_STREAM)
        return self._of_stream[stream]


def _zeros(device: torch.device) -> Tensor:
    def zeros() -> Tensor:
        counters = torch.zeros(STORE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        return counters

    # What this thread allocates may be going into the memory pool of a graph, to be reused when that graph dies.
    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(zeros).result()


_stores: dict[torch.device, Store] = {}
