"""From gates to what the other kernels multiply with, once per call."""

import triton
import triton.language as tl

from .chunks import (
    FLOOR,
    fast_exp,
    find_levels,
    forgets,
    load_rows,
    locate,
    one_minus_exp,
    since_start,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare(
    g, s, until, scaled, levels, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of every token, head and slot [·, H, M], with G_t = Σ_{i≤t} g_i over its block up to t and G_B over the block:

        until = G_t,   scaled = s_t e^{-G_t}, or, where G_B < -RANGE, s_t e^{G_B - G_t};
        levels [chunks, C / BT, H, SLICES] = which levels (see chunks.py) occur in a slice of the slots, 2^(l-1) summed
        over those above 0.

    Sums are in until's dtype: float64 for float32 inputs, so that differences of sums keep float32's digits.
    Grid: (levels.numel(),), slices of BS slots.
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    part, h = program % SLICES, program // SLICES % H
    place, chunk = program // (SLICES * H) % BLOCKS, program // (SLICES * H * BLOCKS)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    token = start + place * BT
    if token >= end:
        return
    left = tl.minimum(end - token, BT).to(tl.int32)
    base = (token * H + h) * M
    g, s, until, scaled = g + base, s + base, until + base, scaled + base
    d = part * BS
    given = load_rows(g, left, d, BT, H * M, M, BS).to(tl.float32)
    sums = _sums(tl.where(given < FLOOR, FLOOR, given).to(until.dtype.element_ty), BT, scaled.dtype.element_ty)
    total = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], sums, 0.0), axis=0)
    if HAS_S:
        write = load_rows(s, left, d, BT, H * M, M, BS).to(tl.float32)
    else:
        write = one_minus_exp(given)
    store_rows(until, sums, left, d, BT, H * M, M, BS)
    exponent = tl.where(forgets(total, RANGE)[None, :], total[None, :] - sums, since_start(sums, RANGE))
    store_rows(scaled, write * fast_exp(exponent), left, d, BT, H * M, M, BS)

    found = 0
    if tl.min(tl.min(sums, axis=1), axis=0) < -RANGE:
        tl.debug_barrier()  # sums are in memory
        need = find_levels(until, sums, left, d, BT, H, M, BS, RANGE)
        bits = tl.where(need > 0, 1 << tl.maximum(need - 1, 0), 0)
        for bit in tl.static_range(3):
            found += tl.max(tl.max(bits & (1 << bit), axis=1), axis=0)
    tl.store(levels + program, found)


@triton.jit
def _sums(x, BT: tl.constexpr, FORMAT: tl.constexpr):
    """Σ_{i≤t} x_i of x [BT, ·] in x's dtype.

    In bfloat16, as in `sums_before_and_from`, by products with ones: of x in three parts, together all its bits.
    """
    if FORMAT == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        ones = tl.where(tl.arange(0, BT)[:, None] >= tl.arange(0, BT)[None, :], 1.0, 0.0).to(tl.bfloat16)
        total = tl.dot(ones, high, tl.dot(ones, middle, tl.dot(ones, low)))
    else:
        total = tl.cumsum(x, axis=0)
    return total
