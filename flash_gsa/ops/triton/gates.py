"""From gates to what the other kernels multiply with, once per call."""

import triton
import triton.language as tl

from .chunks import FLOOR, GROUP_8, GROUP_32, load_rows, locate, one_minus_exp, store_rows


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare(
    g, s, until, shrunk, kept, level, levels, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of every token, head and slot [·, H, M], with G_t = Σ_{i≤t} g_i over its block up to t and G_B over the block:

        until = G_t,   shrunk = s_t e^{-G_t} (the exponent cut at RANGE),   kept = s_t e^{G_B - G_t},
        level = 0 to 3, the reference its products take (see chunks.py);
        levels [chunks, C / BT, H, SLICES] = which occur in a slice of the slots, 2^(l-1) summed over those above 0.

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
    g, s, until, shrunk, kept, level = g + base, s + base, until + base, shrunk + base, kept + base, level + base
    d = part * BS
    given = load_rows(g, left, d, BT, H * M, M, BS).to(tl.float32)
    sums = _sums(tl.where(given < FLOOR, FLOOR, given).to(until.dtype.element_ty), BT, shrunk.dtype.element_ty)
    ot = tl.arange(0, BT)
    total = tl.sum(tl.where((ot == BT - 1)[:, None], sums, 0.0), axis=0)
    if HAS_S:
        write = load_rows(s, left, d, BT, H * M, M, BS).to(tl.float32)
    else:
        write = one_minus_exp(given)
    store_rows(until, sums, left, d, BT, H * M, M, BS)
    store_rows(shrunk, write * tl.exp(tl.minimum(-sums.to(tl.float32), RANGE)), left, d, BT, H * M, M, BS)
    store_rows(kept, write * tl.exp((total[None, :] - sums).to(tl.float32)), left, d, BT, H * M, M, BS)

    found = 0
    if tl.min(tl.min(sums, axis=1), axis=0) < -RANGE:
        tl.debug_barrier()  # sums are in memory
        om = d + tl.arange(0, BS)
        here = (ot < left)[:, None] & (om < M)[None, :]
        since_large = sums - tl.load(until + (ot // GROUP_32 * GROUP_32)[:, None] * (H * M) + om[None, :], here, 0.0)
        since_small = sums - tl.load(until + (ot // GROUP_8 * GROUP_8)[:, None] * (H * M) + om[None, :], here, 0.0)
        beyond = tl.where(since_large >= -RANGE, 1, tl.where(since_small >= -RANGE, 2, 3))
        need = tl.where(here & (sums < -RANGE), beyond, 0)
        store_rows(level, need, left, d, BT, H * M, M, BS)
        bits = tl.where(need > 0, 1 << tl.maximum(need - 1, 0), 0)
        for bit in tl.static_range(3):
            found += tl.max(tl.max(bits & (1 << bit), axis=1), axis=0)
    else:
        # Read where another slice of the block has levels above 0; and what an operator gives back is always written.
        store_rows(level, tl.zeros([BT, BS], tl.int8), left, d, BT, H * M, M, BS)
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
