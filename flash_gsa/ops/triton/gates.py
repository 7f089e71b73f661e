"""From gates to what the other kernels multiply with, once per call."""

import triton
import triton.language as tl

from .chunks import BLOCK_8, locate, one_minus_exp

# e^-104 is below the smallest float32: a stronger gate erases no more, and sums of gates keep their digits.
FLOOR = tl.constexpr(-104.0)


@triton.jit(do_not_specialize=["T", "sequences"])
def prepare(
    g, s, until, shrunk, kept, level, levels, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Of every token, head and slot [·, H, M], with G_t = Σ_{i≤t} g_i over its chunk up to t:

        until = G_t,   shrunk = s_t e^{-G_t} (the exponent cut at RANGE),   kept = s_t e^{G_C - G_t},
        level = 0 to 3, the reference its products take (see chunks.py);
        levels [chunks, H, SLICES] = which occur in a slice of the slots, 2^(l-1) summed over those above 0.

    Sums are in until's dtype: float64 for float32 inputs, so that differences of sums keep float32's digits.
    Tokens are taken as [4, 8] within blocks of 32: sums stay within a thread or its neighbours.
    Grid: (chunks·H·SLICES,), slices of 16 slots.
    """
    program = tl.program_id(0)
    part, h, chunk = program % SLICES, program // SLICES % H, program // SLICES // H
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    base = (token * H + h) * M
    BLOCK: tl.constexpr = BLOCK_8 * 4
    four, eight, om = tl.arange(0, 4), tl.arange(0, BLOCK_8), part * 16 + tl.arange(0, 16)
    slot = om < M

    total = tl.zeros([16], until.dtype.element_ty)
    seen = tl.zeros([4, BLOCK_8, 16], tl.int32)
    for start in range(0, C, BLOCK):
        row = start + four[:, None, None] * BLOCK_8 + eight[None, :, None]
        at = base + row * (H * M) + om[None, None, :]
        here = (row < left) & slot[None, None, :]
        given = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        if HAS_S:
            write = tl.load(s + at, mask=here, other=0.0).to(tl.float32)
        else:
            write = one_minus_exp(given)
        gate = tl.where(given < FLOOR, FLOOR, given).to(until.dtype.element_ty)
        inside = tl.cumsum(gate, axis=1)
        parts = tl.sum(gate, axis=1)
        before = tl.cumsum(parts, axis=0) - parts
        first = tl.sum(tl.where(eight[None, :, None] == 0, gate, 0.0), axis=1)
        very_first = tl.sum(tl.where(four[:, None] == 0, first, 0.0), axis=0)
        since_block = before[:, None, :] + inside - very_first[None, None, :]
        since_eight = inside - first[:, None, :]
        sums = total[None, None, :] + before[:, None, :] + inside
        need = tl.where(-sums <= RANGE, 0, tl.where(-since_block <= RANGE, 1, tl.where(-since_eight <= RANGE, 2, 3)))
        need = tl.where(here, need, 0)
        seen = seen | tl.where(need > 0, 1 << tl.maximum(need - 1, 0), 0)
        total += tl.sum(parts, axis=0)
        tl.store(until + at, sums, mask=here)
        tl.store(level + at, need.to(tl.int8), mask=here)
        factor = tl.exp(tl.minimum(-sums.to(tl.float32), RANGE))
        tl.store(shrunk + at, (write * factor).to(shrunk.dtype.element_ty), mask=here)
    seen = tl.reshape(seen, [64 * BLOCK_8])
    found = tl.max(seen & 1, axis=0) + tl.max(seen & 2, axis=0) + tl.max(seen & 4, axis=0)
    tl.store(levels + program, found)

    tl.debug_barrier()
    for start in range(0, C, BLOCK):
        row = start + four[:, None, None] * BLOCK_8 + eight[None, :, None]
        at = base + row * (H * M) + om[None, None, :]
        here = (row < left) & slot[None, None, :]
        sums = tl.load(until + at, mask=here, other=0.0)
        if HAS_S:
            write = tl.load(s + at, mask=here, other=0.0).to(tl.float32)
        else:
            write = one_minus_exp(tl.load(g + at, mask=here, other=0.0).to(tl.float32))
        factor = tl.exp((total[None, None, :] - sums).to(tl.float32))
        tl.store(kept + at, (write * factor).to(kept.dtype.element_ty), mask=here)
