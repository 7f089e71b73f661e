"""One token of the recurrence in one launch: each number of the state is read once and written once.

A key/value head of a sequence is a group of P programs. Each holds a slice of K̃ (some of K's rows) and of Ṽ (some of
V's columns):

    K̃ = α ∘ K̃ + s ⊗ k     ℓ = Σ_slices K̃ q     p = softmax(scale · ℓ)     Ṽ = α ∘ Ṽ + s ⊗ v     o = Ṽᵀ p

The sum over slices is all that programs must tell each other: each writes its part of ℓ [R, M], waits for the rest of
its group (`arrivals`), and adds the parts up in their order, so that all have the same p and every run the same bits.
While it waits its first tile of Ṽ is on the way. With P = 1 nothing is waited for. The R query heads of a group read
the state while it is in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import State
from .arrivals import PER_MEETING, counters, meet
from .chunks import one_minus_exp


@triton.jit
def step(
    q, k, v, g, s, hk, hv, new_hk, new_hv, o, parts, arrived,
    q_b, k_b, v_b, g_b, s_b, hk_b, hk_h, hk_k, hk_m, hv_b, hv_h, hv_m, hv_v, scale, H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PER_MEETING: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, STAGES: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    """A slice of one group; grid (B·H·P,). x_b, x_h, … are strides; a program has K_TILES and V_TILES tiles."""
    program = tl.program_id(0).to(tl.int64)
    group, part = program // P, (program % P).to(tl.int32)
    b, h = group // H, group % H
    row, om = tl.arange(0, BR), tl.arange(0, BM)
    slot = om < M

    # Padded slots neither forget nor write.
    gate = tl.load(g + b * g_b + h * M + om, mask=slot, other=0.0).to(tl.float32)
    decay = tl.exp(gate)
    if HAS_S:
        write = tl.load(s + b * s_b + h * M + om, mask=slot, other=0.0).to(tl.float32)
    else:
        write = one_minus_exp(gate)

    q += b * q_b + h * R * K
    k += b * k_b + h * K
    v += b * v_b + h * V
    o += group * R * V
    hk_at, hv_at = b * hk_b + h * hk_h, b * hv_b + h * hv_h
    first_value = part * V_TILES * BV
    ahead = values(hv + hv_at, hv_m, hv_v, first_value, om, M, V, BV)

    logits = tl.zeros((BR, BM), tl.float32)
    for i in tl.range(0, K_TILES, num_stages=STAGES):
        ok = (part * K_TILES + i) * BK + tl.arange(0, BK)
        real = ok < K
        inside = real[:, None] & slot[None, :]
        at = hk_at + ok[:, None] * hk_k + om[None, :] * hk_m
        keys = tl.load(hk + at, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(k + ok, mask=real, other=0.0).to(tl.float32)
        queries = ()
        for r in tl.static_range(R):
            queries = queries + (tl.load(q + r * K + ok, mask=real, other=0.0).to(tl.float32),)
        keys = keys * decay[None, :] + key[:, None] * write[None, :]
        tl.store(new_hk + at, keys.to(new_hk.dtype.element_ty), mask=inside)
        for r in tl.static_range(R):
            scores = tl.sum(queries[r][:, None] * keys, axis=0)
            logits += tl.where(row[:, None] == r, scores[None, :], 0.0)

    if P > 1:
        at = row[:, None] * M + om[None, :]
        inside = (row < R)[:, None] & slot[None, :]
        tl.store(parts + program * R * M + at, logits, mask=inside)
        meet(arrived + group, P, PER_MEETING)
        logits = tl.zeros((BR, BM), tl.float32)
        for i in tl.static_range(P):
            # Past the cache of this processor, which knows nothing of what others wrote.
            logits += tl.load(parts + (group * P + i) * R * M + at, mask=inside, other=0.0, cache_modifier=".cg")

    logits = tl.where(slot[None, :], logits * scale, float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]

    write_values(ahead, new_hv + hv_at, hv_m, hv_v, v, o, p, decay, write, first_value, om, row, M, V, R, BV)
    for i in tl.range(1, V_TILES, num_stages=STAGES):
        start = first_value + i * BV
        tile = values(hv + hv_at, hv_m, hv_v, start, om, M, V, BV)
        write_values(tile, new_hv + hv_at, hv_m, hv_v, v, o, p, decay, write, start, om, row, M, V, R, BV)


@triton.jit
def values(hv, hv_m, hv_v, start, om, M: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """A tile of Ṽ [BM, BV], columns from `start`."""
    ov = start + tl.arange(0, BV)
    inside = (om < M)[:, None] & (ov < V)[None, :]
    return tl.load(hv + om[:, None] * hv_m + ov[None, :] * hv_v, mask=inside, other=0.0)


@triton.jit
def write_values(
    tile, new_hv, hv_m, hv_v, v, o, p, decay, write, start, om, row,
    M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Update a tile of Ṽ, store it, and read it with p [BR, BM] into the columns of o from `start`."""
    ov = start + tl.arange(0, BV)
    real = ov < V
    value = tl.load(v + ov, mask=real, other=0.0).to(tl.float32)
    tile = tile.to(tl.float32) * decay[:, None] + write[:, None] * value[None, :]
    inside = (om < M)[:, None] & real[None, :]
    tl.store(new_hv + om[:, None] * hv_m + ov[None, :] * hv_v, tile.to(new_hv.dtype.element_ty), mask=inside)
    for r in tl.static_range(R):
        weights = tl.sum(tl.where(row[:, None] == r, p, 0.0), axis=0)
        read = tl.sum(weights[:, None] * tile, axis=0)
        tl.store(o + r * V + ov, read.to(o.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class Split:
    """programs: P of a group; tile: numbers of state held at once; warps; stages: tiles on the way."""

    programs: int
    tile: int
    warps: int
    stages: int


def choose(groups: int, K: int, V: int, processors: int) -> Split:
    """How `groups` key/value heads are spread over a chip of `processors` multiprocessors (0: one program a group).

    Few groups are split until the programs are two a multiprocessor, the most that are surely there at once
    (128 threads of at most 255 registers), and no further than slices of 16 rows.
    """
    programs = 1
    while 2 * programs * groups <= 2 * processors and 32 * programs <= min(K, V) and 2 * programs <= PER_MEETING:
        programs *= 2
    return Split(programs, tile=4096, warps=4, stages=3)


def triton_step(q, k, v, g, s, state: State, scale: float, in_place: bool = False, split: Split | None = None):
    """`gated_slot_attention_step` as one launch; arguments as there, already validated, without gradients.

    hk may lie as [K, M] or as [M, K] (any strides); the new state lies as the given one does.
    """
    B, HQ, K = q.shape
    H, V, M = k.shape[1], v.shape[2], g.shape[2]
    R, groups = HQ // H, B * H
    o = q.new_empty(B, HQ, V)
    if in_place:
        (hk, hv), new = state, state
    else:
        new = (torch.empty_like(state[0]), torch.empty_like(state[1]))
        # A state with gaps or repeats in memory is copied first: one set of strides then serves both.
        hk, hv = (x if x.stride() == y.stride() else y.copy_(x) for x, y in zip(state, new, strict=True))
    if groups == 0:
        return o, new
    q, k, v, g = (_rows(x) for x in (q, k, v, g))
    s = None if s is None else _rows(s)
    split = split or choose(groups, K, V, _processors(q.device))
    P = split.programs
    BM = triton.next_power_of_2(M)
    BK, K_TILES = _cut(triton.cdiv(K, P), split.tile // BM)
    BV, V_TILES = _cut(triton.cdiv(V, P), split.tile // BM)
    with torch.cuda.device_of(q):
        parts = q.new_empty(groups * P * R * M, dtype=torch.float32) if P > 1 else None
        step[(groups * P,)](
            q, k, v, g, s, hk, hv, *new, o, parts, counters(groups, q.device) if P > 1 else None,
            *(x.stride(0) for x in (q, k, v, g)), 0 if s is None else s.stride(0), *hk.stride(), *hv.stride(),
            float(scale), H, K=K, V=V, M=M, R=R, P=P, PER_MEETING=PER_MEETING,
            BK=BK, BV=BV, BM=BM, BR=triton.next_power_of_2(R), K_TILES=K_TILES, V_TILES=V_TILES,
            STAGES=split.stages, HAS_S=s is not None, num_warps=split.warps,
        )  # fmt: skip
    return o, new


def _rows(x: Tensor) -> Tensor:
    """x [B, ·, D] with rows one after the other; its batch stride is free."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _cut(length: int, most: int) -> tuple[int, int]:
    """(width, number) of tiles that cover `length`; widths are powers of two up to `most`."""
    width = min(triton.next_power_of_2(length), most)
    return width, triton.cdiv(length, width)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
