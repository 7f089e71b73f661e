"""From gates to what the other kernels multiply with, once per call."""

import triton
import triton.language as tl

from .chunks import locate, one_minus_exp

# e^-104 is below the smallest float32: a stronger gate erases no more, and sums of gates keep their digits.
FLOOR = tl.constexpr(-104.0)


@triton.jit
def prepare(
    g, s, until, shrunk, kept, level, levels, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of every token, head and slot [·, H, M], with G_t = Σ_{i≤t} g_i over its chunk up to t:

        until = G_t,   shrunk = s_t e^{-G_t} (the exponent cut at RANGE),   kept = s_t e^{G_C - G_t},
        level = 0 to 3, the reference its products take (see chunks.py);
        levels [chunks, H] = which occur in a chunk, 2^(l-1) summed over those above 0.

    Sums are in until's dtype: float64 for float32 inputs, so that differences of sums keep float32's digits.
    Tokens are taken as [4, 4] within blocks of 16: sums stay within a thread or its neighbours. Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h, chunk = program % H, program // H
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    base = (token * H + h) * M
    four, om = tl.arange(0, 4), tl.arange(0, BM)
    slot = om < M

    total = tl.zeros([BM], until.dtype.element_ty)
    seen = tl.zeros([4, 4, BM], tl.int32)
    for start in range(0, C, 16):
        row = start + four[:, None, None] * 4 + four[None, :, None]
        at = base + row * (H * M) + om[None, None, :]
        here = (row < left) & slot[None, None, :]
        given = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        if HAS_S:
            write = tl.load(s + at, mask=here, other=0.0).to(tl.float32)
        else:
            write = one_minus_exp(given)
        gate = tl.where(given < FLOOR, FLOOR, given).to(until.dtype.element_ty)
        inside = tl.cumsum(gate, axis=1)
        fours = tl.sum(gate, axis=1)
        before = tl.cumsum(fours, axis=0) - fours
        first = tl.sum(tl.where(four[None, :, None] == 0, gate, 0.0), axis=1)
        very_first = tl.sum(tl.where(four[:, None] == 0, first, 0.0), axis=0)
        since_block = before[:, None, :] + inside - very_first[None, None, :]
        since_four = inside - first[:, None, :]
        sums = total[None, None, :] + before[:, None, :] + inside
        need = tl.where(-sums <= RANGE, 0, tl.where(-since_block <= RANGE, 1, tl.where(-since_four <= RANGE, 2, 3)))
        need = tl.where(here, need, 0)
        seen = seen | tl.where(need > 0, 1 << tl.maximum(need - 1, 0), 0)
        total += tl.sum(fours, axis=0)
        tl.store(until + at, sums, mask=here)
        tl.store(level + at, need.to(tl.int8), mask=here)
        factor = tl.exp(tl.minimum(-sums.to(tl.float32), RANGE))
        tl.store(shrunk + at, (write * factor).to(shrunk.dtype.element_ty), mask=here)
    seen = tl.reshape(seen, [16 * BM])
    found = tl.max(seen & 1, axis=0) + tl.max(seen & 2, axis=0) + tl.max(seen & 4, axis=0)
    tl.store(levels + chunk * H + h, found)

    tl.debug_barrier()
    for start in range(0, C, 16):
        row = start + four[:, None, None] * 4 + four[None, :, None]
        at = base + row * (H * M) + om[None, None, :]
        here = (row < left) & slot[None, None, :]
        sums = tl.load(until + at, mask=here, other=0.0)
        if HAS_S:
            write = tl.load(s + at, mask=here, other=0.0).to(tl.float32)
        else:
            write = one_minus_exp(tl.load(g + at, mask=here, other=0.0).to(tl.float32))
        factor = tl.exp((total[None, None, :] - sums).to(tl.float32))
        tl.store(kept + at, (write * factor).to(kept.dtype.element_ty), mask=here)
