"""Forward kernels: states before every chunk, then outputs of every chunk.

`states_forward` walks the chunks of a sequence and writes both states as they are before each of them; `outputs`
then does pass 1, the softmax and pass 2 of one chunk and query head without leaving the chip. Formulas:
docs/mechanism.md. Names of sizes: C tokens a chunk, D one slice of K or V, M slots (padded to BM, a power of two).
"""

import triton
import triton.language as tl

from .chunks import load_gates, locate
from .strong_gates import direct_attention, direct_logits


@triton.jit
def states_forward(
    k, v, g, s, hk0, hv0, hk, hv, hkT, hvT, cu_seqlens, first_chunk, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, HAS_S: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    WANT_FINAL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hk, hv [chunks, H, M, K | V]: both states before each chunk; hkT, hvT [N, H, M, K | V]: after the last.

    Grid: (slices of K and of V, N·H). One program carries one slice of one state of one head through time.
    """
    part, nh = tl.program_id(0), tl.program_id(1)
    n, h = nh // H, nh % H
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        chunk = tl.load(first_chunk + n).to(tl.int64)
    else:
        start = n.to(tl.int64) * T
        end = start + T
        chunk = n.to(tl.int64) * tl.cdiv(T, C)

    KEY_PARTS: tl.constexpr = (K + BD - 1) // BD
    oc, om = tl.arange(0, C), tl.arange(0, BM)
    size = tl.where(part < KEY_PARTS, K, V)
    od = tl.where(part < KEY_PARTS, part, part - KEY_PARTS) * BD + tl.arange(0, BD)
    x, initial, out, final = k, hk0, hk, hkT
    if part >= KEY_PARTS:
        x, initial, out, final = v, hv0, hv, hvT
    inside = (om[:, None] < M) & (od[None, :] < size)
    at_state = om[:, None] * size + od[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + nh.to(tl.int64) * M * size + at_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BM, BD], tl.float32)

    for token in range(start, end, C):
        tl.store(out + (chunk * H + h) * M * size + at_state, state.to(out.dtype.element_ty), mask=inside)
        real = token + oc < end
        row = (token + oc) * H + h
        gate, after, write = load_gates(g, s, row, real, (oc < C - 1) & (token + oc + 1 < end), om, H, M, HAS_S)
        remaining = tl.cumsum(after, axis=0, reverse=True)
        weight = (write * tl.exp(remaining)).to(DOT)
        values = tl.load(x + row[:, None] * size + od[None, :], mask=real[:, None] & (od[None, :] < size), other=0.0)
        state = state * tl.exp(tl.sum(gate, axis=0))[:, None]
        state = tl.dot(tl.trans(weight), values.to(DOT), state, input_precision=PRECISION)
        chunk += 1
    if WANT_FINAL:
        tl.store(final + nh.to(tl.int64) * M * size + at_state, state, mask=inside)


@triton.jit
def outputs(
    q, k, v, g, s, hk, hv, o, logits, cu_seqlens, chunk_sequence, first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr, KEEP_LOGITS: tl.constexpr,
    RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [·, HQ, V] and, for the backward, logits [·, HQ, M] of one chunk and query head.

    Grid: (chunks·H·R,), the query heads of a group next to each other, so that k, v and states come from L2.
    """
    program = tl.program_id(0)
    hq = program % (H * R)
    chunk = program // (H * R)
    h = hq // R
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    token, left = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, H, C, PACKED)

    oc, om = tl.arange(0, C), tl.arange(0, BM)
    real = oc < left
    row = (token + oc) * H + h
    row_q = (token + oc) * (H * R) + hq
    state = (chunk.to(tl.int64) * H + h) * M
    slot = om < M

    scores = tl.zeros([C, C], tl.float32)
    old = tl.zeros([C, BM], tl.float32)
    for d in range(0, K, BD):
        od = d + tl.arange(0, BD)
        in_d = od < K
        qd = tl.load(q + row_q[:, None] * K + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        kd = tl.load(k + row[None, :] * K + od[:, None], mask=real[None, :] & in_d[:, None], other=0.0)
        hd = tl.load(hk + (state + om[None, :]) * K + od[:, None], mask=slot[None, :] & in_d[:, None], other=0.0)
        scores = tl.dot(qd, kd, scores, input_precision=PRECISION)
        old = tl.dot(qd.to(DOT), hd.to(DOT), old, input_precision=PRECISION)
    causal = oc[:, None] >= oc[None, :]
    scores = tl.where(causal, scores * scale, 0.0)
    old = old * scale

    gate, _, write = load_gates(g, s, row, real, (oc < C - 1) & (oc + 1 < left), om, H, M, HAS_S)
    until = tl.cumsum(gate, axis=0)
    grown = tl.exp(until)
    shrunk = (write * tl.exp(tl.minimum(-until, RANGE))).to(DOT)
    z = grown * tl.dot(scores.to(DOT), shrunk, old, input_precision=PRECISION)
    direct = tl.min(until, axis=1) < -RANGE
    some_direct = tl.min(tl.min(until, axis=1), axis=0) < -RANGE
    if some_direct:
        again = grown * old + direct_logits(scores, g, s, token, left, h, om, H, M, C, BM, HAS_S)
        z = tl.where(direct[:, None], again, z)
    at_logits = row_q[:, None] * M + om[None, :]
    if KEEP_LOGITS:
        tl.store(logits + at_logits, z, mask=real[:, None] & slot[None, :])
    z = tl.where(slot[None, :], z, float("-inf"))
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]

    read = (p * grown).to(DOT)
    a = tl.dot(read, tl.trans(shrunk), input_precision=PRECISION)
    if some_direct:
        again_a = direct_attention(p, g, s, token, left, h, om, H, M, C, BM, HAS_S)
        a = tl.where(direct[:, None], again_a, a)
    a = tl.where(causal, a, 0.0).to(DOT)
    for d in range(0, V, BD):
        od = d + tl.arange(0, BD)
        in_d = od < V
        vd = tl.load(v + row[:, None] * V + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        hd = tl.load(hv + (state + om[:, None]) * V + od[None, :], mask=slot[:, None] & in_d[None, :], other=0.0)
        od_out = tl.dot(read, hd.to(DOT), input_precision=PRECISION)
        od_out = tl.dot(a, vd.to(DOT), od_out, input_precision=PRECISION)
        tl.store(
            o + row_q[:, None] * V + od[None, :], od_out.to(o.dtype.element_ty), mask=real[:, None] & in_d[None, :]
        )
