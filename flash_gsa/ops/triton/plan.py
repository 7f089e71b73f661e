"""How one call is cut into launches: chunks, segments, tile sizes, compile-time constants."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gates, launching
from .tables import parts_of
from .tiles import Tile, choose, forced

# Largest exponent of a gate factor: e^60 leaves float32 and bfloat16 room for the sums of its products.
RANGE = 60.0
# Programs of a walk that keep the memory busy (measured: 128 stream as fast as 512). Long sequences are cut into
# segments until there are as many; each cut costs one more pass over the inputs, so not sooner.
FILLING = 128
# Of kernels that only touch gates; BD means nothing there.
OVER_GATES = Tile(0, 4, 1)
# `gates_backward` for chunks of two blocks holds more at once, and two programs would fill a multiprocessor. With 168
# registers for a thread three do: 36 µs at the 1.3B layer, not 39.
OVER_TWO_BLOCKS = Tile(0, 4, 1, 168)
# A kernel's options: no multiplication is fused with an addition, see `Plan.launch`.
EXACT = {"enable_fp_fusion": False}
# How many plans a process keeps: of sizes, and of boundaries of packed sequences.
KEPT = 256
Made = TypeVar("Made")


def cdiv(a, b):
    """a / b rounded up; also of torch.compile's symbolic integers."""
    return -(-a // b)


def padded(M: int, dtype: torch.dtype) -> int:
    """Slots as tiles hold them: a power of two, at least 16, in 16-bit formats 64.

    With 16 and 32 slots in tiles of their own size, tests in bfloat16 failed on an H100; with 64 rows, as Hopper's own
    products have, they pass. The cause was not found.
    """
    return max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(M))


class Parts:
    """Sequences cut into stretches of `span` tokens: how many, and for packed sequences which is whose.

    For packed sequences `count` is an upper bound that needs no look at the lengths; surplus programs return at once.
    Every sequence has one at least, an empty one too; or, with `beyond`, those of at most so many tokens have none.
    """

    def __init__(self, B: int, T: int, span: int, cu_seqlens: Tensor | None, beyond: int | None = None):
        self.span, self.cu_seqlens, self.beyond = span, cu_seqlens, beyond
        if cu_seqlens is None:
            self.count = 0 if beyond is not None and T <= beyond else B * cdiv(T, span)
        else:
            sequences = cu_seqlens.numel() - 1
            self.count = T // span + (sequences if beyond is None else min(sequences, T // (beyond + 1)))

    def tables(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The sequence of every part, and the first part of every sequence [S+1]."""
        if self.cu_seqlens is None:
            return None, None
        if self.cu_seqlens.device.type != "cpu":
            sequence, first = parts_of(self.cu_seqlens, self.span, self.beyond, self.count)
            return sequence.to(device), first.to(device)
        lengths = self.cu_seqlens.diff()
        parts = (lengths + self.span - 1) // self.span
        parts = parts.clamp(min=1) if self.beyond is None else parts * (lengths > self.beyond)
        first = torch.zeros(parts.numel() + 1, dtype=torch.int32, device=parts.device)
        torch.cumsum(parts, 0, out=first[1:])
        index = torch.arange(self.count, dtype=torch.int32, device=parts.device)
        sequence = torch.searchsorted(first[1:], index, right=True, out_int32=True).clamp_(max=parts.numel() - 1)
        return sequence.to(device, non_blocking=True), first.to(device, non_blocking=True)


class Plan:
    """How one call is cut: chunks, segments, tile sizes, compile-time constants.

    `linear`: gated linear attention, which is the second pass alone: q takes the place of p and k that of s, over
    M = K slots, so that there are no keys left: K = 0.
    """

    def __init__(self, q, k, v, g, has_s: bool, cu_seqlens: Tensor | None, linear: bool = False):
        self.B, self.T, self.HQ, K = q.shape
        self.K = 0 if linear else K
        self.H, self.V, self.M = k.shape[2], v.shape[3], g.shape[3]
        self.R = self.HQ // self.H
        self.tiles = choose(q.dtype, self.K, self.V, self.M, self.R, q.device)
        C = self.tiles.C
        self.cu_seqlens, self.device = cu_seqlens, q.device
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.numel() - 1
        # An empty sequence has a chunk, of no tokens, so that n sequences before a chunk have as many that are last.
        self.chunks = Parts(self.B, self.T, C, cu_seqlens)
        half = q.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if half else torch.float32
        self.sum_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
        self.blocks = C // self.tiles.BT
        BM = padded(self.M, q.dtype)
        # Slots of one program of a kernel over gates. Preparing those of the 1.3B layer: 26 µs, by 64 32, by 16 30.
        self.slice = min(32, BM)
        self.slot_slices = cdiv(self.M, self.slice)
        self.rehearsed: set[tuple[bool, ...]] = set()  # see `ahead`
        self.constants = {
            "H": self.H,
            "R": self.R,
            "K": self.K,
            "V": self.V,
            "M": self.M,
            "BM": BM,
            "C": C,
            "BT": self.tiles.BT,
            "PACKED": cu_seqlens is not None,
            "LINEAR": linear,
            "HAS_S": has_s,
            "RANGE": RANGE,
            "SLICES": self.slot_slices,
            # float16 has too little range for e^{±G}; its products with gates are done in TF32, of equal precision.
            "DOT": tl.bfloat16 if half else tl.float32,
            "PRECISION": "tf32" if q.dtype in (torch.bfloat16, torch.float16) else "ieee",
        }

    @functools.cached_property
    def _variants(self) -> dict[tuple, launching.Variant]:
        """What plans with these constants have launched; found at a launch, since sizes of fake tensors are no keys."""
        return variants(*self.constants.values())

    @functools.cached_property
    def segment_chunks(self) -> int:
        """Chunks of a segment, the stretches of a sequence that are walked in parallel.

        Found at the first launch: for fake tensors it would tie a graph to its length.
        """
        walks = self.H * self.slices(self.tiles.states)
        # At least 8: cutting costs one more pass over the inputs.
        return max(8, cdiv(cdiv(self.B * self.T, self.tiles.C) * walks, FILLING))

    @functools.cached_property
    def split(self) -> bool:
        """Whether a sequence may have several segments."""
        return self.segment_chunks * self.tiles.C < self.T

    @functools.cached_property
    def segments(self) -> Parts:
        """Of all sequences, for walks from a state or to one."""
        return Parts(self.B, self.T, self.segment_chunks * self.tiles.C, self.cu_seqlens)

    @functools.cached_property
    def inner_segments(self) -> Parts:
        """Of sequences with several chunks, for walks from and to nothing: in others no state is wanted."""
        C = self.tiles.C
        return Parts(self.B, self.T, self.segment_chunks * C, self.cu_seqlens, beyond=C)

    @functools.cached_property
    def table(self) -> tuple:
        """What kernels over chunks need to find their tokens."""
        if self.cu_seqlens is None:
            return None, None, None, self.T, self.sequences
        cu = self.cu_seqlens.to(self.device, torch.int32, non_blocking=True)
        return cu, *self.chunks.tables(self.device), self.T, self.sequences

    @functools.cached_property
    def segment_table(self) -> tuple:
        """What walks over `segments` need to find their tokens."""
        return self._walked(self.segments)

    @functools.cached_property
    def inner_segment_table(self) -> tuple:
        """What walks over `inner_segments` need to find their tokens."""
        return self._walked(self.inner_segments)

    def _walked(self, segments: Parts) -> tuple:
        cu, _, first_chunk, *sizes = self.table
        return cu, *segments.tables(self.device), first_chunk, *sizes, self.segment_chunks

    def slices(self, tile) -> int:
        """Programs that share a head's states in a walk."""
        return cdiv(self.K, tile.BD) + cdiv(self.V, tile.BD)

    def states(self, like: Tensor, at_ends: bool) -> tuple[Tensor, Tensor]:
        """Room for both states between chunks and, with at_ends, at one end of every sequence."""
        of_k, of_v = self.state_shapes(at_ends)
        return like.new_empty(of_k, dtype=self.state_dtype), like.new_empty(of_v, dtype=self.state_dtype)

    def state_shapes(self, at_ends: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of `states`."""
        count = self.chunks.count if at_ends else self.chunks.count - self.sequences
        return (count, self.H, self.M, self.K), (count, self.H, self.M, self.V)

    def boundary_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both states of every sequence, before its first token or after its last: float32."""
        return self._pair(like, self.sequences)

    def _pair(self, like: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return (
            like.new_empty(count, self.H, self.M, self.K, dtype=torch.float32),
            like.new_empty(count, self.H, self.M, self.V, dtype=torch.float32),
        )

    def gate_tensors(self, g: Tensor) -> tuple[Tensor, ...]:
        """Room for until, scaled and levels: see `gates.prepare`."""
        return (
            torch.empty_like(g, dtype=self.sum_dtype),
            torch.empty_like(g, dtype=self.state_dtype),
            g.new_empty(self.chunks.count, self.blocks, self.H, self.slot_slices, dtype=torch.int32),
        )

    def prepare(self, g: Tensor, s: Tensor, out: Sequence[Tensor]) -> None:
        """Fill `gate_tensors`; exact, as `launch` has it, because `outputs` makes some of the same numbers."""
        arguments = (g, s, *out, *self.table)
        self._launch(gates.prepare, out[-1].numel(), arguments, {"BS": self.slice}, OVER_GATES, **EXACT)

    def over_gates(self, kernel, arguments, **constants) -> None:
        """Launch a kernel over chunks, heads and slices of slots that only touches gates."""
        programs = self.chunks.count * self.H * self.slot_slices
        constants["BS"] = self.slice
        tile = OVER_GATES if self.blocks == 1 else OVER_TWO_BLOCKS
        self._launch(kernel, programs, (*arguments, *self.table), constants, tile)

    def walk(self, kernel, tile, at_ends: bool, like: Tensor, arguments, scales=(), **constants) -> None:
        """Launch a walk over segments; where a sequence has several, first for what each of them adds alone.

        at_ends: it starts from states or ends with some that are wanted.
        """
        segments = self.segments if at_ends else self.inner_segments
        programs = segments.count * self.H * self.slices(tile)
        if not programs:
            return
        table = (*(self.segment_table if at_ends else self.inner_segment_table), *scales)
        constants["BD"] = tile.BD
        local: tuple[Tensor | None, ...] = (None, None, None)
        if self.split:
            # Only segments that others follow, or precede, have some: by the stretch of all tokens they begin in.
            stretches = cdiv(self.B * self.T, segments.span)
            decay = like.new_empty(stretches, self.H, self.M, dtype=torch.float32)
            local = (*self._pair(like, stretches), decay)
            alone = constants | {"LOCAL": True, "SPLIT": False}
            self._launch(kernel, programs, (*arguments, *local, *table), alone, tile)
        constants |= {"LOCAL": False, "SPLIT": self.split}
        self._launch(kernel, programs, (*arguments, *local, *table), constants, tile)

    def launch(self, kernel, tile, programs: int, arguments, scales, exact: bool = False, **constants) -> None:
        """Launch a kernel over chunks, `programs` of them for each.

        exact: no multiplication is fused with an addition, so that what stands in the code twice has the same bits, and
        a number taken from itself leaves nothing (dp from its mean, where the softmax is at one slot).
        """
        constants["BD"] = tile.BD
        options = EXACT if exact else {}
        arguments = (*arguments, *self.table, *scales)
        self._launch(kernel, self.chunks.count * programs, arguments, constants, tile, **options)

    def _launch(self, kernel, programs: int, arguments: tuple, constants: dict, tile: Tile, **options) -> None:
        """Launch with `constants`, and of the plan's own those that the kernel has."""
        # A kernel's constants have the same names in the same order wherever it is launched, options the same values.
        key = (kernel.fn, tile, *constants.values(), *options)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._variant(kernel, constants, tile, options)
        launching.launch(variant, programs, arguments)

    def _variant(self, kernel, constants: dict, tile: Tile, options: dict) -> launching.Variant:
        own = {name: value for name, value in self.constants.items() if name in kernel.arg_names}
        if tile.registers < 255:
            options["maxnreg"] = tile.registers
        pairs = frozenset((own | constants).items()), tile.warps, tile.stages, frozenset(options.items())
        return launching.variant(kernel, *pairs)


@functools.cache
def variants(*constants) -> dict[tuple, launching.Variant]:
    """What plans with these constants have launched, by what is told at a launch."""
    return {}


def plan_for(q, k, v, g, has_s: bool, cu_seqlens: Tensor | None, linear: bool = False) -> Plan:
    """The plan of a call: that of the last call of the same sizes and, with packed sequences, the same boundaries."""
    sizes = (q.shape, k.shape[2], v.shape[3], g.shape[3], q.dtype, q.device, has_s, linear, forced())
    return kept(_plans, sizes, q.device, cu_seqlens, lambda own: Plan(q, k, v, g, has_s, own, linear))


def kept(
    cuts: dict[tuple, Made],
    sizes: tuple,
    device: torch.device,
    cu_seqlens: Tensor | None,
    make: Callable[[Tensor | None], Made],
) -> Made:
    """What of `cuts` has these sizes and boundaries; else what `make` gives for a copy of the boundaries.

    The layers of a model are called with the same boundaries, forward and backward, and to make tables of them anew
    would take the host longer than the launches of a call. They are compared by value, for which they must be on the
    CPU; what is made on one stream is for that stream, and what is made while a graph is captured belongs to the graph.
    """
    key = sizes
    if cu_seqlens is not None:
        if cu_seqlens.device.type != "cpu":
            return make(cu_seqlens)
        stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make(cu_seqlens)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (*sizes, stream, cu_seqlens.dtype, cu_seqlens.numpy().tobytes())
    found = cuts.get(key)
    if found is None:
        if len(cuts) >= KEPT:
            cuts.clear()
        found = cuts[key] = make(None if cu_seqlens is None else cu_seqlens.clone())
    return found


_plans: dict[tuple, Plan] = {}
