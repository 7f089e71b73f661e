"""From gates to what the other kernels multiply with, once per call."""

import triton
import triton.language as tl

from .chunks import load_rows, load_write, locate, store_rows

# e^-104 is below the smallest float32: a stronger gate erases no more, and sums of gates keep their digits.
FLOOR = tl.constexpr(-104.0)
EXACT = tl.constexpr("tf32x3")


@triton.jit
def prepare(
    g, s, until, shrunk, kept, level, highest, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, SUB: tl.constexpr, RANGE: tl.constexpr,
    HAS_S: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of every token, head and slot [·, H, M], with G_t = Σ_{i≤t} g_i over its chunk up to t:

        until  = G_t,   shrunk = s_t e^{-G_t} (the exponent cut at RANGE),   kept = s_t e^{G_C - G_t},
        level  = 0, 1 or 2: the reference its products take (see chunks.py);  highest [chunks, H]: a chunk's largest.

    Sums are in until's dtype (float64 for float32 inputs: differences of them keep float32's digits).
    Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h, chunk = program % H, program // H
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    at = (token * H + h) * M
    oc, om = tl.arange(0, C), tl.arange(0, BM)

    gate = load_rows(g + at, left, 0, C, H * M, M, BM).to(tl.float32)
    gate = tl.where(gate < FLOOR, FLOOR, gate)
    # Sums over tokens as products with matrices of ones: faster than scans across threads, and in three parts of
    # tf32 as precise as float32.
    row, column = oc[:, None], oc[None, :]
    inside = (column <= row) & (column // SUB == row // SUB) & (column % SUB > 0)
    since = tl.dot(inside.to(tl.float32), gate, input_precision=EXACT)
    if until.dtype.element_ty == tl.float64:
        sums = tl.cumsum(gate.to(tl.float64), axis=0)
        last = tl.sum(gate.to(tl.float64), axis=0)
    else:
        sums = tl.dot((column <= row).to(tl.float32), gate, input_precision=EXACT)
        last = tl.sum(gate, axis=0)

    write = load_write(g + at, s + at, left, C, H, M, BM, HAS_S)
    need = tl.where(-sums <= RANGE, 0, tl.where(-since <= RANGE, 1, 2))
    need = tl.where((oc < left)[:, None] & (om < M)[None, :], need, 0)
    store_rows(until + at, sums, left, 0, C, H * M, M, BM)
    store_rows(shrunk + at, write * tl.exp(tl.minimum(-sums.to(tl.float32), RANGE)), left, 0, C, H * M, M, BM)
    store_rows(kept + at, write * tl.exp((last[None, :] - sums).to(tl.float32)), left, 0, C, H * M, M, BM)
    store_rows(level + at, need, left, 0, C, H * M, M, BM)
    tl.store(highest + chunk * H + h, tl.max(tl.max(need, axis=1), axis=0))
