"""One token of the recurrence in one launch: each number of the state is read once and written once.

Where both states lie by slots, as prefill leaves them, and heads are enough to fill the chip, `step_slots` does it in
one pass. This kernel takes any order, any number of query heads, and few heads faster, in two:

A key/value head of a sequence is a group of P programs. Each holds a slice of K̃ (some of K's rows) and of Ṽ (some of
V's columns):

    K̃ = α ∘ K̃ + s ⊗ k     ℓ = Σ_slices K̃ q     p = softmax(scale · ℓ)     Ṽ = α ∘ Ṽ + s ⊗ v     o = Ṽᵀ p

The sum over slices is all that programs must tell each other: each writes its part of ℓ [R, M], waits for the rest of
its group (`arrivals`), and adds the parts up in their order, so that all have the same p and every run the same bits.
Before it waits it has loaded and updated its first tile of Ṽ. With P = 1 nothing is waited for. The R query heads of
a group read the state while it is in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..once import differentiated
from ..reference import reference_step
from ..registry import State
from .arrivals import PER_MEETING, arrive, meeting_place, wait
from .chunks import one_minus_exp
from .launching import run
from .step_slots import step_slots

MOST_AT_ONCE = 8
"""Query heads of a group that read a tile together; `step_slots` takes no more."""


@triton.jit
def step(
    q, k, v, g, s, hk, hv, new_hk, new_hv, o, parts, arrived,
    q_b, k_b, v_b, g_b, s_b, hk_b, hk_h, hk_k, hk_m, hv_b, hv_h, hv_m, hv_v, scale, H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PER_MEETING: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    """A slice of one group; grid (B·H·P,). x_b, x_h, … are strides; a program has K_TILES and V_TILES tiles."""
    program = tl.program_id(0).to(tl.int64)
    group, part = program // P, (program % P).to(tl.int32)
    b, h = group // H, group % H
    q += b * q_b + h * R * K
    k += b * k_b + h * K
    v += b * v_b + h * V
    o += group * R * V
    hk += b * hk_b + h * hk_h
    hv += b * hv_b + h * hv_h
    new_hk += b * hk_b + h * hk_h
    new_hv += b * hv_b + h * hv_h
    row, om = tl.arange(0, BR), tl.arange(0, BM)

    ok = part * (K_TILES * BK) + tl.arange(0, BK)
    if K_TILES == 1:
        keys, key = load_tile(hk, hk_k, hk_m, k, ok, om, K, M)
        queries = load_queries(q, 0, ok, K, R, ROWS)
    ov = part * (V_TILES * BV) + tl.arange(0, BV)
    values, value = load_tile(hv, hv_v, hv_m, v, ov, om, V, M)
    # The compiler moves loads down to their use, but not past a barrier: so all these are on their way together.
    tl.debug_barrier()

    # Padded slots neither forget nor write.
    gate = tl.load(g + b * g_b + h * M + om, mask=om < M, other=0.0).to(tl.float32)
    decay = tl.exp(gate)
    if HAS_S:
        write = tl.load(s + b * s_b + h * M + om, mask=om < M, other=0.0).to(tl.float32)
    else:
        write = one_minus_exp(gate)

    logits = tl.zeros((BR, BM), tl.float32)
    if K_TILES == 1:
        keys = update_tile(keys, key, new_hk, hk_k, hk_m, ok, om, decay, write, K, M)
        logits = add_scores(logits, keys, queries, q, ok, row, K, R, ROWS)
    else:
        for _ in tl.range(0, K_TILES, num_stages=STAGES):
            keys, key = load_tile(hk, hk_k, hk_m, k, ok, om, K, M)
            queries = load_queries(q, 0, ok, K, R, ROWS)
            keys = update_tile(keys, key, new_hk, hk_k, hk_m, ok, om, decay, write, K, M)
            logits = add_scores(logits, keys, queries, q, ok, row, K, R, ROWS)
            ok += BK

    if P > 1:
        tl.store(parts + program * BR * BM + row[:, None] * BM + om[None, :], logits)
        goal = arrive(arrived + group, P, PER_MEETING)
    values = update_tile(values, value, new_hv, hv_v, hv_m, ov, om, decay, write, V, M)
    if P > 1:
        wait(arrived + group, goal)
        # In loads of one number a thread: the tile of Ṽ takes the layout of the last load, and after a larger one
        # would not fit the registers.
        one = tl.arange(0, AT_ONCE)[:, None] * (BR * BM) + om[None, :]
        found = ()
        for r in tl.static_range(R):
            for i in tl.static_range(0, P, AT_ONCE):
                # Past the cache of this processor, which knows nothing of what others wrote.
                at = parts + ((group * P + i) * BR + r) * BM + one
                found += (tl.load(at, cache_modifier=".cg"),)  # type: ignore[assignment]
        tl.debug_barrier()
        for r in tl.static_range(R):
            total = tl.zeros((AT_ONCE, BM), tl.float32)
            for i in tl.static_range(P // AT_ONCE):
                total += found[r * (P // AT_ONCE) + i]
            logits = tl.where(row[:, None] == r, tl.sum(total, axis=0)[None, :], logits)

    logits = tl.where((om < M)[None, :], logits * scale, float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]

    write_outputs(o, values, p, ov, row, V, R, ROWS)
    for _ in tl.range(1, V_TILES, num_stages=STAGES):
        ov += BV
        values, value = load_tile(hv, hv_v, hv_m, v, ov, om, V, M)
        values = update_tile(values, value, new_hv, hv_v, hv_m, ov, om, decay, write, V, M)
        write_outputs(o, values, p, ov, row, V, R, ROWS)


@triton.jit
def load_tile(state, stride_d, stride_m, x, od, om, D: tl.constexpr, M: tl.constexpr):
    """Of a state, the rows `od` (those < D) of all slots [BD, BM]; and the token's own part of these rows [BD]."""
    real = od < D
    inside = real[:, None] & (om < M)[None, :]
    tile = tl.load(state + od[:, None] * stride_d + om[None, :] * stride_m, mask=inside, other=0.0)
    return tile, tl.load(x + od, mask=real, other=0.0)


@triton.jit
def update_tile(tile, x, new, stride_d, stride_m, od, om, decay, write, D: tl.constexpr, M: tl.constexpr):
    """What `load_tile` read, one token later, stored and returned in float32."""
    tile = tile.to(tl.float32) * decay[None, :] + x.to(tl.float32)[:, None] * write[None, :]
    inside = (od < D)[:, None] & (om < M)[None, :]
    tl.store(new + od[:, None] * stride_d + om[None, :] * stride_m, tile.to(new.dtype.element_ty), mask=inside)
    return tile


@triton.jit
def load_queries(q, first, ok, K: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """The columns `ok` of ROWS query heads from `first`; 0 past the R-th."""
    queries = ()
    for r in tl.static_range(ROWS):
        real = ok < tl.where(first + r < R, K, 0)
        row = tl.load(q + (first + r) * K + ok, mask=real, other=0.0)
        queries += (row.to(tl.float32),)  # type: ignore[assignment]
    return queries


@triton.jit
def add_scores(logits, keys, queries, q, ok, row, K: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """logits [BR, BM] plus what the rows `ok` of K̃ add to it; `queries` are the first ROWS query heads."""
    for r in tl.static_range(ROWS):
        logits += tl.where(row[:, None] == r, tl.sum(queries[r][:, None] * keys, axis=0)[None, :], 0.0)
    if R > ROWS:
        for first in range(ROWS, R, ROWS):
            more = load_queries(q, first, ok, K, R, ROWS)
            for r in tl.static_range(ROWS):
                scores = tl.sum(more[r][:, None] * keys, axis=0)
                logits += tl.where(row[:, None] == first + r, scores[None, :], 0.0)
    return logits


@triton.jit
def write_outputs(o, values, p, ov, row, V: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """The columns `ov` of Ṽᵀ p, for each row of p [BR, BM]."""
    if R <= ROWS:
        for r in tl.static_range(R):
            write_output(o + r * V + ov, values, p, row == r, ov < V)
    else:
        for r in range(R):
            write_output(o + r * V + ov, values, p, row == r, ov < V)


@triton.jit
def write_output(o, values, p, mine, real):
    """The same for the row of p that `mine` marks."""
    weights = tl.sum(tl.where(mine[:, None], p, 0.0), axis=0)
    read = tl.sum(values * weights[None, :], axis=1)
    tl.store(o, read.to(o.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class Split:
    """programs: P of a group; tile: most numbers of a state held at once; warps; stages: tiles on the way."""

    programs: int
    tile: int
    warps: int
    stages: int


def choose(groups: int, K: int, V: int, M: int, R: int, processors: int) -> Split:
    """How `groups` key/value heads are spread over a chip of `processors` multiprocessors (0: one program a group)."""
    programs = 1
    # Two programs of 128 threads with up to 255 registers surely fit on a multiprocessor: all are there at once, as
    # `arrivals` wants. Slices under 16 rows are not worth a program, and every program reads R·P rows of parts.
    while programs * groups <= processors and 32 * programs <= min(K, V) and 2 * programs * R <= PER_MEETING:
        programs *= 2
    # Rows that are no multiple of 16 numbers are read number by number, each with its address in a register.
    tile = 1024 if K % 16 or V % 16 or M % 16 else 2048 if programs == 1 else 4096
    return Split(programs, tile, warps=4, stages=4 if programs == 1 else 3)


def choose_by_slots(groups: int, M: int, D: int, R: int, itemsize: int, processors: int) -> Split:
    """The same for `step_slots`, where no program waits for another; D: the wider of a slot's two rows, a number of
    which has `itemsize` bytes.

    Times are µs a layer on one H100 (132 multiprocessors), B sequences with 64 slots: 1.3B has 4 heads of 512, 7B 32
    query and 8 key/value heads of 128.
    """
    if R == 1:
        # Four slots, of which a thread loads 64 bytes. Two slots, 1.3B: float32, B 256, 195 instead of 191; bfloat16,
        # B 64, 27.8 instead of 27.6. Eight, the 340M layer (4 heads of 256), float32: B 8, four programs, 7.2 instead
        # of 6.7; B 256, 99 instead of 100. Twice the threads, 1.3B: bfloat16, B 64, 29.1. Narrower heads than 128
        # have more slots a tile, which was not measured.
        tile = min(2048, max(512, 4 * D))
        warps = max(1, tile * itemsize // 2048)
    else:
        # Two warps meet in the sum of every row for every query head, one does not: 7B bfloat16, B 64, 15.5 and 18.4.
        # Eight query heads leave fewer registers: 17.2 with 512 numbers, 22.8 with 1,024.
        tile, warps = 1024 if R <= 4 else 512, 1
    programs = 1
    # Only where heads alone leave the chip idle. 1.3B float32: B 32, one program 26.5, two 28.8, four 27.8; B 16, one
    # 15.6, four 14.4, eight 14.1. 7B bfloat16: B 32, one 10.2, four 11.9; B 16, one 9.3, four 8.0.
    if groups * tile < 1536 * processors:
        if R > 1:
            # 7B float32, B 8: 512 numbers and eight programs 7.8, 1,024 and four 8.4.
            tile = min(tile, 2048 // itemsize)
        # Each has two tiles at least: 7B bfloat16, B 16, one tile 8.5, two 8.0. And adds up R·P parts, not too many:
        # eight query heads, B 16, four programs 11.8, eight 12.9 (B 8, 10.9 and 10.4).
        most = min(M // (2 * max(1, tile // D)), 32 // R)
        while programs * groups * tile < 6144 * processors and 2 * programs <= most:
            programs *= 2
    # 1.3B bfloat16: B 64, three stages 26.8, four 27.6; B 32, 17.1 and 16.3.
    return Split(programs, tile, warps, stages=4)


def triton_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, state: State, scale: float, in_place: bool = False
) -> tuple[Tensor, State]:
    """`gated_slot_attention_step` as one launch; arguments as there, already validated.

    q [B, HQ, K], k [B, H, K], v [B, H, V], g and s [B, H, M], hk [B, H, K, M], hv [B, H, M, V] → o [B, HQ, V] and the
    new state. hk may lie in memory as [K, M] or as [M, K]; the new state lies as the given one does. Where a gradient
    is wanted, the reference computes the step.
    """
    hk, hv = state
    differentiable = differentiated(q, k, v, g, s, hk, hv)
    # The kernel's offsets inside of a head have 32 bits.
    if differentiable or max(*hk.stride()[2:], *hv.stride()[2:]) > 2**21:
        return reference_step(q, k, v, g, s, state, scale, in_place)
    compiling = torch.compiler.is_compiling()
    if in_place:
        o = (_in_place_op if compiling else step_in_place)(q, k, v, g, s, hk, hv, float(scale))
    else:
        o, hk, hv = (_anew_op if compiling else step_anew)(q, k, v, g, s, hk, hv, float(scale))
    return o, (hk, hv)


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, hk: Tensor, hv: Tensor, scale: float
) -> Tensor:
    """o; hk and hv are updated."""
    o = launch(q, k, v, g, s, (hk, hv), (hk, hv), scale)
    for x in (hk, hv):
        if not x.is_inference():  # a graph that had saved it must not use it
            torch.autograd.graph.increment_version(x)
    return o


def step_anew(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, hk: Tensor, hv: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o and the new hk and hv."""
    new = torch.empty_like(hk), torch.empty_like(hv)
    # A state with gaps or repeats in memory is copied first: one set of strides then serves both.
    hk, hv = (x if x.stride() == y.stride() else y.copy_(x) for x, y in zip((hk, hv), new, strict=True))
    return launch(q, k, v, g, s, (hk, hv), new, scale), *new


# What torch.compile sees of a step: one opaque operation, without a break of its graph.
_in_place_op = torch.library.custom_op("flash_gsa::step_in_place", step_in_place, mutates_args=("hk", "hv"))
_anew_op = torch.library.custom_op("flash_gsa::step_anew", step_anew, mutates_args=())


@_in_place_op.register_fake
def _(q, k, v, g, s, hk, hv, scale):
    return q.new_empty(*q.shape[:2], v.shape[2])


@_anew_op.register_fake
def _(q, k, v, g, s, hk, hv, scale):
    return q.new_empty(*q.shape[:2], v.shape[2]), torch.empty_like(hk), torch.empty_like(hv)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    state: State,
    new: State,
    scale: float,
    split: Split | None = None,
) -> Tensor:
    """o; the state after the token is written to `new`, which has the strides of `state` or is it.

    A given `split` is for `step_slots` wherever that can take the state, else for `step`.
    """
    B, HQ, K = q.shape
    H, V, M = k.shape[1], v.shape[2], g.shape[2]
    R, groups = HQ // H, B * H
    o = q.new_empty(B, HQ, V)
    if groups == 0:
        return o
    BK, BV, BM, BR = (triton.next_power_of_2(x) for x in (K, V, M, R))
    by_slots = lies_by_slots(state) and R <= MOST_AT_ONCE
    if split is None:
        processors = processors_of(q.device)
        by_slots = by_slots and takes_slots(groups, R, processors)
        if by_slots:
            split = choose_by_slots(groups, M, max(BK, BV), R, state[0].element_size(), processors)
        else:
            split = choose(groups, K, V, M, R, processors)
    P = split.programs
    q, k, v, g = (by_rows(x) for x in (q, k, v, g))
    s = None if s is None else by_rows(s)
    parts = arrived = None
    with torch.cuda.device_of(q):
        if P > 1:
            parts, arrived = meeting_place(groups, groups * P * (R * (BV + 2) if by_slots else BR * BM), q.device)
        places = (q, k, v, g, s, *state, *new, o, parts, arrived)
        strides = [0 if x is None else x.stride(0) for x in (q, k, v, g, s)]
        constants = {"K": K, "V": V, "M": M, "R": R, "P": P, "PER_MEETING": PER_MEETING, "HAS_S": s is not None}
        (hk_b, hk_h, hk_k, hk_m), (hv_b, hv_h, hv_m, hv_v) = (x.stride() for x in state)
        if by_slots:
            BM, TILES = cut(triton.cdiv(M, P), max(1, split.tile // max(BK, BV)))
            arguments = (*places, *strides, hk_b, hk_h, hk_m, hv_b, hv_h, hv_m, scale, H)
            constants |= {"BK": BK, "BV": BV, "BM": BM, "TILES": TILES, "STAGES": min(split.stages, TILES + 1)}
            constants["AT_ONCE"] = max(1, min(P, 1024 * split.warps // BV))
            constants["APART"] = rows_apart(BM, BV, split.warps, state[0].element_size())
            run(step_slots, groups * P, arguments, constants, split.warps)
        else:
            BK, K_TILES = cut(triton.cdiv(K, P), split.tile // BM)
            BV, V_TILES = cut(triton.cdiv(V, P), split.tile // BM)
            # Loads of fewer numbers than threads leave the tiles of Ṽ, which come in a loop, their layout: read in
            # that of a larger load, each costs thousands of cycles.
            AT_ONCE = 1 if V_TILES > 1 else max(1, min(P, 32 * split.warps // BM))
            arguments = (*places, *strides, hk_b, hk_h, hk_k, hk_m, hv_b, hv_h, hv_m, hv_v, scale, H)
            constants |= {"BK": BK, "BV": BV, "BM": BM, "BR": BR, "ROWS": min(R, MOST_AT_ONCE)}
            constants |= {"K_TILES": K_TILES, "V_TILES": V_TILES, "AT_ONCE": AT_ONCE, "STAGES": split.stages}
            run(step, groups * P, arguments, constants, split.warps)
    return o


def takes_slots(groups: int, R: int, processors: int) -> bool:
    """Whether `step_slots` ends sooner than `step`: not where there are few groups.

    H100, float32: 8 (1.3B, B 2) 5.4 µs against 5.2, 16 (B 4) 6.3 against 7.3; four query heads: 16 (7B, B 2) 5.6
    against 5.5, in bfloat16 6.2 against 5.1; 32 (B 4) 6.8 against 6.9, in bfloat16 6.6 against 6.4; eight: 32 (B 4)
    10.5 against 9.4, 64 (B 8) 10.9 against 13.5.
    """
    return groups > processors // (16 if R == 1 else 8 if R <= 4 else 4)


def lies_by_slots(state: State) -> bool:
    """Whether the numbers of a slot lie side by side, in both states."""
    hk, hv = state
    return hk.stride(2) == 1 and hv.stride(3) == 1


def by_rows(x: Tensor) -> Tensor:
    """x [B, ·, D] with rows one after the other; its batch stride is free."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def cut(length: int, most: int) -> tuple[int, int]:
    """(width, number) of tiles that cover `length`; widths are powers of two up to `most`."""
    width = min(triton.next_power_of_2(length), most)
    return width, triton.cdiv(length, width)


def rows_apart(rows: int, width: int, warps: int, itemsize: int) -> int:
    """How many of a tile's rows lie in different threads: a thread loads 16 bytes of a row at once."""
    return max(1, min(rows, 32 * warps * (16 // itemsize) // width))


def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
