"""Backward kernels.

With dp_t = Ṽ_t do_t the gradient of the softmax's output and dℓ = p ∘ (dp - Σ_m p dp), one chunk at a time:

    queries:   dp_t = e^{G_t} ∘ (do_t Ṽ₀ᵀ) + Σ_{j≤t} (do_t·v_j) s_j e^{G_t-G_j}              (pass 1 with do, v, Ṽ)
               dq_t = (dℓ_t ∘ e^{G_t}) K̃₀ + Σ_{j≤t} b_tj k_j,  b_tj = Σ_m dℓ_tm s_jm e^{G_tm-G_jm}   (pass 2)
    states:    dK̃₀  = e^{G_C} ∘ dK̃₁ + Σ_t (dℓ_t e^{G_t}) ⊗ q_t                 (Ṽ likewise with p, do), last chunk first
    keys:      dk_j = Σ_{t≥j} b_tj q_t + (s_j e^{G_C-G_j}) dK̃₁                     (dv_j with a_tj, do_t, dṼ₁)
    write:     ds_j = Σ_{t≥j} [(q_t·k_j) dℓ_t + (do_t·v_j) p_t] e^{G_t-G_j} + e^{G_C-G_j} ∘ (dK̃₁ k_j + dṼ₁ v_j)
    gates:     every ℓ_t and dp_t carries e^{G_t}, every s_j e^{-G_j}, and what passes the chunk whole e^{G_C}, so
               dg_i = Σ_{t≥i} (dℓ_t ∘ ℓ_t + p_t ∘ dp_t - s_t ∘ ds_t) + ⟨dK̃₁, K̃₁⟩ + ⟨dṼ₁, Ṽ₁⟩     (t in the chunk)

In the last line K̃₁ is split into e^{G_C} ∘ K̃₀ and what the chunk wrote; the written part cancels against the
part of s ∘ ds that comes from dK̃₁ for t ≥ i, so it is summed over t < i instead: no cancellation, and sums that
start anew in every chunk.
"""

import triton
import triton.language as tl

from .chunks import load_gates, locate
from .strong_gates import direct_attention, direct_logits, direct_write_gradient


@triton.jit
def queries_backward(
    q, k, v, g, s, hk, hv, logits, do, dq, p_out, dl_out, dgate, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [·, HQ, K]; p, dℓ [·, HQ, M] for the kernels after; dgate [·, HQ, M] float32: dℓ ∘ ℓ + p ∘ dp.

    Grid: (chunks·H·R,), as in `outputs`.
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
    for d in range(0, V, BD):
        od = d + tl.arange(0, BD)
        in_d = od < V
        dod = tl.load(do + row_q[:, None] * V + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        vd = tl.load(v + row[None, :] * V + od[:, None], mask=real[None, :] & in_d[:, None], other=0.0)
        hd = tl.load(hv + (state + om[None, :]) * V + od[:, None], mask=slot[None, :] & in_d[:, None], other=0.0)
        scores = tl.dot(dod, vd, scores, input_precision=PRECISION)
        old = tl.dot(dod.to(DOT), hd.to(DOT), old, input_precision=PRECISION)
    causal = oc[:, None] >= oc[None, :]
    scores = tl.where(causal, scores, 0.0)

    gate, _, write = load_gates(g, s, row, real, (oc < C - 1) & (oc + 1 < left), om, H, M, HAS_S)
    until = tl.cumsum(gate, axis=0)
    grown = tl.exp(until)
    shrunk = (write * tl.exp(tl.minimum(-until, RANGE))).to(DOT)
    direct = tl.min(until, axis=1) < -RANGE
    some_direct = tl.min(tl.min(until, axis=1), axis=0) < -RANGE
    dp = grown * tl.dot(scores.to(DOT), shrunk, old, input_precision=PRECISION)
    if some_direct:
        again = grown * old + direct_logits(scores, g, s, token, left, h, om, H, M, C, BM, HAS_S)
        dp = tl.where(direct[:, None], again, dp)

    at = row_q[:, None] * M + om[None, :]
    here = real[:, None] & slot[None, :]
    z = tl.load(logits + at, mask=here, other=0.0)
    zm = tl.where(slot[None, :], z, float("-inf"))
    p = tl.exp(zm - tl.max(zm, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    dl = p * (dp - tl.sum(p * dp, axis=1)[:, None])
    tl.store(p_out + at, p.to(p_out.dtype.element_ty), mask=here)
    tl.store(dl_out + at, dl.to(dl_out.dtype.element_ty), mask=here)
    tl.store(dgate + at, dl * z + p * dp, mask=here)

    read = (dl * grown).to(DOT)
    b = tl.dot(read, tl.trans(shrunk), input_precision=PRECISION)
    if some_direct:
        again_b = direct_attention(dl, g, s, token, left, h, om, H, M, C, BM, HAS_S)
        b = tl.where(direct[:, None], again_b, b)
    b = tl.where(causal, b, 0.0).to(DOT)
    for d in range(0, K, BD):
        od = d + tl.arange(0, BD)
        in_d = od < K
        kd = tl.load(k + row[:, None] * K + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        hd = tl.load(hk + (state + om[:, None]) * K + od[None, :], mask=slot[:, None] & in_d[None, :], other=0.0)
        x = tl.dot(read, hd.to(DOT), input_precision=PRECISION)
        x = tl.dot(b, kd.to(DOT), x, input_precision=PRECISION) * scale
        tl.store(dq + row_q[:, None] * K + od[None, :], x.to(dq.dtype.element_ty), mask=real[:, None] & in_d[None, :])


@triton.jit
def states_backward(
    q, do, g, p, dl, dhkT, dhvT, dhk, dhv, dhk0, dhv0, cu_seqlens, first_chunk, T, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dhk, dhv [chunks, H, M, K | V]: gradients of both states after each chunk; dhk0, dhv0 of the initial ones.

    Grid: (slices of K and of V, N·H), walking from a sequence's last chunk to its first.
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
    factor = tl.where(part < KEY_PARTS, scale, 1.0)
    od = tl.where(part < KEY_PARTS, part, part - KEY_PARTS) * BD + tl.arange(0, BD)
    x, y, final, out, initial = q, dl, dhkT, dhk, dhk0
    if part >= KEY_PARTS:
        x, y, final, out, initial = do, p, dhvT, dhv, dhv0
    slot = om < M
    inside = slot[:, None] & (od[None, :] < size)
    at_state = om[:, None] * size + od[None, :]
    if HAS_FINAL:
        state = tl.load(final + nh.to(tl.int64) * M * size + at_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BM, BD], tl.float32)

    steps = tl.cdiv(end - start, C)
    for back in range(steps):
        i = steps - 1 - back
        token = start + i * C
        tl.store(out + ((chunk + i) * H + h) * M * size + at_state, state.to(out.dtype.element_ty), mask=inside)
        real = token + oc < end
        at_gate = ((token + oc) * H + h)[:, None] * M + om[None, :]
        gate = tl.load(g + at_gate, mask=real[:, None] & slot[None, :], other=0.0).to(tl.float32)
        grown = tl.exp(tl.cumsum(gate, axis=0))
        state = state * tl.exp(tl.sum(gate, axis=0))[:, None]
        for r in range(R):
            row_q = (token + oc) * (H * R) + h * R + r
            weight = tl.load(y + row_q[:, None] * M + om[None, :], mask=real[:, None] & slot[None, :], other=0.0)
            weight = (weight.to(tl.float32) * grown * factor).to(DOT)
            xd = tl.load(x + row_q[:, None] * size + od[None, :], mask=real[:, None] & (od[None, :] < size), other=0.0)
            state = tl.dot(tl.trans(weight), xd.to(DOT), state, input_precision=PRECISION)
    if WANT_INITIAL:
        tl.store(initial + nh.to(tl.int64) * M * size + at_state, state, mask=inside)


@triton.jit
def keys_backward(
    q, k, v, g, s, hk, hv, do, p, dl, dgate, dhk, dhv, dk, dv, ds, dg, cu_seqlens, chunk_sequence, first_chunk, T,
    sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [·, H, K], dv [·, H, V], and in float32 ds (where s was given), dg [·, H, M] of one chunk and kv head.

    Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h = program % H
    chunk = program // H
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    token, left = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, H, C, PACKED)
    oc, om = tl.arange(0, C), tl.arange(0, BM)
    real = oc < left
    slot = om < M
    row = (token + oc) * H + h
    state = (chunk.to(tl.int64) * H + h) * M
    here = real[:, None] & slot[None, :]
    causal = oc[:, None] >= oc[None, :]

    gate, after, write = load_gates(g, s, row, real, (oc < C - 1) & (oc + 1 < left), om, H, M, HAS_S)
    until = tl.cumsum(gate, axis=0)
    grown = tl.exp(until)
    inverse = tl.exp(tl.minimum(-until, RANGE))
    shrunk = (write * inverse).to(DOT)
    remaining = tl.exp(tl.cumsum(after, axis=0, reverse=True))
    kept = (write * remaining).to(DOT)
    direct = tl.min(until, axis=1) < -RANGE
    some_direct = tl.min(tl.min(until, axis=1), axis=0) < -RANGE

    # ds from inside the chunk, and the sum of dℓ ∘ ℓ + p ∘ dp over the query heads.
    written = tl.zeros([C, BM], tl.float32)
    sums = tl.zeros([C, BM], tl.float32)
    for r in range(R):
        row_q = (token + oc) * (H * R) + h * R + r
        at = row_q[:, None] * M + om[None, :]
        pr = tl.load(p + at, mask=here, other=0.0).to(tl.float32)
        dlr = tl.load(dl + at, mask=here, other=0.0).to(tl.float32)
        sums += tl.load(dgate + at, mask=here, other=0.0)
        qk = tl.zeros([C, C], tl.float32)
        for d in range(0, K, BD):
            od = d + tl.arange(0, BD)
            in_d = od < K
            qd = tl.load(q + row_q[:, None] * K + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
            kd = tl.load(k + row[None, :] * K + od[:, None], mask=real[None, :] & in_d[:, None], other=0.0)
            qk = tl.dot(qd, kd, qk, input_precision=PRECISION)
        dov = tl.zeros([C, C], tl.float32)
        for d in range(0, V, BD):
            od = d + tl.arange(0, BD)
            in_d = od < V
            dod = tl.load(do + row_q[:, None] * V + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
            vd = tl.load(v + row[None, :] * V + od[:, None], mask=real[None, :] & in_d[:, None], other=0.0)
            dov = tl.dot(dod, vd, dov, input_precision=PRECISION)
        qk = tl.where(causal, qk * scale, 0.0)
        dov = tl.where(causal, dov, 0.0)
        factored_dl, factored_p = dlr * grown, pr * grown
        if some_direct:
            factored_dl = tl.where(direct[:, None], 0.0, factored_dl)
            factored_p = tl.where(direct[:, None], 0.0, factored_p)
        w = tl.dot(tl.trans(qk.to(DOT)), factored_dl.to(DOT), input_precision=PRECISION)
        w = tl.dot(tl.trans(dov.to(DOT)), factored_p.to(DOT), w, input_precision=PRECISION)
        written += w * inverse
        if some_direct:
            written += direct_write_gradient(qk, dlr, direct, g, token, left, h, om, H, M, C, BM)
            written += direct_write_gradient(dov, pr, direct, g, token, left, h, om, H, M, C, BM)

    passed = tl.zeros([BM], tl.float32)
    carried = tl.zeros([C, BM], tl.float32)
    for d in range(0, K, BD):
        od = d + tl.arange(0, BD)
        in_d = od < K
        in_state = slot[:, None] & in_d[None, :]
        at_state = (state + om[:, None]) * K + od[None, :]
        dh = tl.load(dhk + at_state, mask=in_state, other=0.0)
        h0 = tl.load(hk + at_state, mask=in_state, other=0.0)
        passed += tl.sum(dh.to(tl.float32) * h0.to(tl.float32), axis=1)
        kd = tl.load(k + row[:, None] * K + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        carried = tl.dot(kd.to(DOT), tl.trans(dh.to(DOT)), carried, input_precision=PRECISION)
        x = tl.dot(kept, dh.to(DOT), input_precision=PRECISION)
        for r in range(R):
            row_q = (token + oc) * (H * R) + h * R + r
            dlr = tl.load(dl + row_q[:, None] * M + om[None, :], mask=here, other=0.0).to(tl.float32)
            b = tl.dot((dlr * grown).to(DOT), tl.trans(shrunk), input_precision=PRECISION)
            if some_direct:
                again = direct_attention(dlr, g, s, token, left, h, om, H, M, C, BM, HAS_S)
                b = tl.where(direct[:, None], again, b)
            b = tl.where(causal, b * scale, 0.0).to(DOT)
            qd = tl.load(q + row_q[:, None] * K + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
            x = tl.dot(tl.trans(b), qd.to(DOT), x, input_precision=PRECISION)
        tl.store(dk + row[:, None] * K + od[None, :], x.to(dk.dtype.element_ty), mask=real[:, None] & in_d[None, :])
    for d in range(0, V, BD):
        od = d + tl.arange(0, BD)
        in_d = od < V
        in_state = slot[:, None] & in_d[None, :]
        at_state = (state + om[:, None]) * V + od[None, :]
        dh = tl.load(dhv + at_state, mask=in_state, other=0.0)
        h0 = tl.load(hv + at_state, mask=in_state, other=0.0)
        passed += tl.sum(dh.to(tl.float32) * h0.to(tl.float32), axis=1)
        vd = tl.load(v + row[:, None] * V + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
        carried = tl.dot(vd.to(DOT), tl.trans(dh.to(DOT)), carried, input_precision=PRECISION)
        x = tl.dot(kept, dh.to(DOT), input_precision=PRECISION)
        for r in range(R):
            row_q = (token + oc) * (H * R) + h * R + r
            pr = tl.load(p + row_q[:, None] * M + om[None, :], mask=here, other=0.0).to(tl.float32)
            a = tl.dot((pr * grown).to(DOT), tl.trans(shrunk), input_precision=PRECISION)
            if some_direct:
                again = direct_attention(pr, g, s, token, left, h, om, H, M, C, BM, HAS_S)
                a = tl.where(direct[:, None], again, a)
            a = tl.where(causal, a, 0.0).to(DOT)
            dod = tl.load(do + row_q[:, None] * V + od[None, :], mask=real[:, None] & in_d[None, :], other=0.0)
            x = tl.dot(tl.trans(a), dod.to(DOT), x, input_precision=PRECISION)
        tl.store(dv + row[:, None] * V + od[None, :], x.to(dv.dtype.element_ty), mask=real[:, None] & in_d[None, :])

    carried = carried * remaining
    at = row[:, None] * M + om[None, :]
    inner = sums - write * written
    later = write * carried
    total = tl.cumsum(inner, axis=0, reverse=True) + (tl.cumsum(later, axis=0) - later)
    total += (passed * tl.exp(tl.sum(gate, axis=0)))[None, :]
    if HAS_S:
        tl.store(ds + at, written + carried, mask=here)
    else:
        total -= tl.exp(gate) * (written + carried)
    tl.store(dg + at, total, mask=here)
