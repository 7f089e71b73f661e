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

from .chunks import (
    causal_products,
    load_levels,
    load_rows,
    load_write,
    locate,
    near_attention,
    near_attention_any,
    near_attention_transposed,
    near_logits,
    near_writes,
    products,
    store_rows,
    sums_over_tokens,
    time_order,
    write_products,
)


@triton.jit(do_not_specialize=["T", "sequences"])
def values_backward(
    q, v, g, s, until, shrunk, level, levels, hv, p, lse, do, dq, dl, read_p, read_dl, dgate, dwrite, cu_seqlens,
    chunk_sequence, first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    SLICES: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 2 backward: read_p = p ∘ e^G, read_dl = dℓ ∘ e^G and dℓ [·, HQ, M] (dℓ only where levels above 0 occur).

    In float32 [·, H, M] its share of dg from inside the chunk, dgate, and where s is given of ds, dwrite.
    LINEAR: q takes the place of p, and scale · dp is its gradient. Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h = program % H
    chunk = time_order(program // H, T, sequences, C, PACKED, False)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    row, row_q = token * H + h, token * (H * R) + h * R
    state = (chunk * H + h).to(tl.int64) * M
    gates = row * M
    found = load_levels(levels, chunk * H + h, SLICES)

    oc = tl.arange(0, C)
    written = tl.zeros([C, BM], tl.float32)
    for r in range(R):
        at = (row_q + r) * M
        scores, old = products(
            do + (row_q + r) * V, v + row * V, hv + state * V, left, scale,
            C, H * R * V, H * V, V, BD, M, BM, DOT, PRECISION,
        )  # fmt: skip
        dp = near_logits(
            scores, old, g + gates, s + gates, until + gates, shrunk + gates, level + gates, found, left,
            C, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
        )  # fmt: skip
        grown = tl.exp(load_rows(until + gates, left, 0, C, H * M, M, BM).to(tl.float32))
        if LINEAR:
            weight = load_rows(q + at, left, 0, C, H * R * M, M, BM).to(tl.float32)
            store_rows(dq + at, dp, left, 0, C, H * R * M, M, BM)
            from_queries = weight * dp
        else:
            weight = load_rows(p + at, left, 0, C, H * R * M, M, BM).to(tl.float32)
            dlogits = weight * (dp - tl.sum(weight * dp, axis=1)[:, None])
            total = tl.load(lse + row_q + r + oc * (H * R), mask=oc < left, other=0.0)
            z = tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)) + total[:, None], 0.0)
            from_queries = dlogits * z + weight * dp
            store_rows(read_dl + at, dlogits * grown, left, 0, C, H * R * M, M, BM)
            if found > 0:
                store_rows(dl + at, dlogits, left, 0, C, H * R * M, M, BM)
        store_rows(read_p + at, weight * grown, left, 0, C, H * R * M, M, BM)
        # Summed in memory: in registers it would be spilled over the products that follow.
        if r > 0:
            from_queries += load_rows(dgate + gates, left, 0, C, H * M, M, BM)
        store_rows(dgate + gates, from_queries, left, 0, C, H * M, M, BM)
        written += near_writes(
            scores, weight, until + gates, level + gates, found, left, C, H, M, BM, RANGE, DOT, PRECISION
        )

    tl.debug_barrier()
    write = load_write(g + gates, s + gates, left, C, H, M, BM, HAS_S)
    from_queries = load_rows(dgate + gates, left, 0, C, H * M, M, BM)
    total = sums_over_tokens(from_queries - write * written, C, True, DOT)
    if HAS_S:
        store_rows(dwrite + gates, written, left, 0, C, H * M, M, BM)
    else:
        total -= tl.exp(load_rows(g + gates, left, 0, C, H * M, M, BM).to(tl.float32)) * written
    store_rows(dgate + gates, total, left, 0, C, H * M, M, BM)


@triton.jit(do_not_specialize=["T", "sequences"])
def queries_backward(
    q, k, g, s, until, shrunk, level, levels, hk, dl, read_dl, dq, dgate, dwrite, cu_seqlens, chunk_sequence,
    first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    SLICES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 1 backward: dq [·, HQ, K]; and its share of dg and ds from inside the chunk, added to dgate and dwrite.

    Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h = program % H
    chunk = time_order(program // H, T, sequences, C, PACKED, True)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    row, row_q = token * H + h, token * (H * R) + h * R
    state = (chunk * H + h).to(tl.int64) * M
    gates = row * M
    found = load_levels(levels, chunk * H + h, SLICES)

    written = tl.zeros([C, BM], tl.float32)
    for r in range(R):
        at = (row_q + r) * M
        scores = causal_products(
            q + (row_q + r) * K, k + row * K, left, scale, C, H * R * K, H * K, K, BD, DOT, PRECISION
        )
        read = load_rows(read_dl + at, left, 0, C, H * R * M, M, BM).to(DOT)
        if found > 0:
            weight = load_rows(dl + at, left, 0, C, H * R * M, M, BM).to(tl.float32)
            written += near_writes(
                scores, weight, until + gates, level + gates, found, left, C, H, M, BM, RANGE, DOT, PRECISION
            )
            near = near_attention_any(
                read, weight, g + gates, s + gates, until + gates, shrunk + gates, level + gates, found, left,
                C, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
        else:
            sums = load_rows(until + gates, left, 0, C, H * M, M, BM).to(tl.float32)
            written += tl.exp(-sums) * tl.dot(tl.trans(scores), read, input_precision=PRECISION)
            near = near_attention(read, shrunk + gates, left, C, H, M, BM, DOT, PRECISION)
        write_products(
            near, k + row * K, read, hk + state * K, dq + (row_q + r) * K, left, scale,
            C, H * K, H * R * K, K, BD, M, BM, DOT, PRECISION,
        )  # fmt: skip

    write = load_write(g + gates, s + gates, left, C, H, M, BM, HAS_S)
    total = load_rows(dgate + gates, left, 0, C, H * M, M, BM)
    total -= sums_over_tokens(write * written, C, True, DOT)
    if HAS_S:
        sums = load_rows(dwrite + gates, left, 0, C, H * M, M, BM)
        store_rows(dwrite + gates, sums + written, left, 0, C, H * M, M, BM)
    else:
        total -= tl.exp(load_rows(g + gates, left, 0, C, H * M, M, BM).to(tl.float32)) * written
    store_rows(dgate + gates, total, left, 0, C, H * M, M, BM)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def states_backward(
    q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, dhk0, dhv0, local_k, local_v, decay,
    cu_seqlens, segment_sequence, first_segment, first_chunk, T, sequences, segment_chunks, key_scale, value_scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, LOCAL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dhk, dhv [chunks, H, M, K | V]: gradients of both states after each chunk; dhk0, dhv0 of the initial ones;
    passed [chunks, H, slices, M]: ⟨dhk, hk⟩, ⟨dhv, hv⟩ over each slice. dhk, dhv may be the memory of hk, hv.

    The mirror of `states_forward`, walking a segment from its last chunk to its first; LOCAL: of every segment but
    a sequence's first.
    """
    KEY_PARTS: tl.constexpr = (K + BD - 1) // BD
    PARTS: tl.constexpr = KEY_PARTS + (V + BD - 1) // BD
    program = tl.program_id(0)
    part, h, segment = program % PARTS, program // PARTS % H, program // PARTS // H
    if PACKED:
        if segment >= tl.load(first_segment + sequences):
            return
    span = segment_chunks * C
    n, index, start, end, first = locate(segment, cu_seqlens, segment_sequence, first_segment, T, span, PACKED)
    if PACKED:
        chunk = tl.load(first_chunk + n) + index * segment_chunks
        behind = tl.load(first_segment + n + 1)
    else:
        chunk = n * tl.cdiv(T, C) + index * segment_chunks
        behind = first + tl.cdiv(T, span)
    if LOCAL:
        if index == 0:
            return

    oc, om = tl.arange(0, C), tl.arange(0, BM)
    size = tl.where(part < KEY_PARTS, K, V)
    factor = tl.where(part < KEY_PARTS, key_scale, value_scale)
    od = tl.where(part < KEY_PARTS, part, part - KEY_PARTS) * BD + tl.arange(0, BD)
    x, y, states, final, out, initial, local = q, read_dl, hk, dhkT, dhk, dhk0, local_k
    if part >= KEY_PARTS:
        x, y, states, final, out, initial, local = do, read_p, hv, dhvT, dhv, dhv0, local_v
    slot = om < M
    inside = slot[:, None] & (od[None, :] < size)
    at_state = om[:, None] * size + od[None, :]
    one = (M * size).to(tl.int64)
    state = tl.zeros([BM, BD], tl.float32)
    if not LOCAL:
        if HAS_FINAL:
            state = tl.load(final + (n * H + h) * one + at_state, mask=inside, other=0.0).to(tl.float32)
        if SPLIT:
            for i in range(behind - 1 - segment):
                after = (behind - 1 - i) * H + h
                gates = tl.load(decay + after.to(tl.int64) * M + om, mask=slot, other=0.0)
                state = state * tl.exp(gates)[:, None]
                state += tl.load(local + after * one + at_state, mask=inside, other=0.0)

    steps = tl.minimum(tl.cdiv(end - start, C), segment_chunks).to(tl.int32)
    all_gates = tl.zeros([BM], tl.float32)
    if not LOCAL:
        before = tl.load(states + ((chunk + steps - 1) * H + h) * one + at_state, mask=inside, other=0.0)
    for back in range(steps):
        i = steps - 1 - back
        token = start + i * C
        left = end - token
        if not LOCAL:
            here = (chunk + i) * H + h
            tl.store(out + here * one + at_state, state.to(out.dtype.element_ty), mask=inside)
            product = tl.sum(state * before.to(tl.float32), axis=1)
            tl.store(passed + (here.to(tl.int64) * PARTS + part) * M + om, product, mask=slot)
            # The next turn's state, loaded a turn ahead.
            before = tl.load(
                states + (here - H) * one + at_state, mask=inside & (od[None, :] < tl.where(i > 0, size, 0)), other=0.0
            )
        last = until + ((token + tl.minimum(left, C) - 1) * H + h) * M
        total = tl.load(last + om, mask=slot, other=0.0).to(tl.float32)
        state = state * tl.exp(total)[:, None]
        all_gates += total
        for r in range(R):
            row_q = token * (H * R) + h * R + r
            weight = load_rows(y + row_q * M, left, 0, C, H * R * M, M, BM)
            values = tl.load(
                x + row_q * size + oc[:, None] * (H * R * size) + od[None, :],
                mask=(oc < left)[:, None] & (od[None, :] < size),
                other=0.0,
            )
            addition = tl.dot(tl.trans(weight.to(DOT)), values.to(DOT), input_precision=PRECISION)
            state += addition * factor
    if LOCAL:
        here = segment * H + h
        tl.store(local + here * one + at_state, state, mask=inside)
        tl.store(decay + here.to(tl.int64) * M + om, all_gates, mask=om < tl.where(part == 0, M, 0))
    else:
        if WANT_INITIAL:
            tl.store(
                initial + (n * H + h) * one + at_state,
                state,
                mask=inside & (od[None, :] < tl.where(index == 0, size, 0)),
            )


@triton.jit(do_not_specialize=["T", "sequences"])
def keys_backward(
    q, k, v, g, s, until, shrunk, kept, level, levels, do, p, dl, read_p, read_dl, dwrite, passed, dhk, dhv, dk, dv,
    ds, dg, cu_seqlens, chunk_sequence, first_chunk, T, sequences, key_scale, value_scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    SLICES: tl.constexpr, PARTS: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [·, H, K], dv [·, H, V], ds where s is given [·, H, M] of one chunk and kv head; completes dg, which holds
    dgate. LINEAR: p is q, and only the second half is done. Grid: (chunks·H,).
    """
    program = tl.program_id(0)
    h = program % H
    chunk = time_order(program // H, T, sequences, C, PACKED, False)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, token, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    left = tl.minimum(end - token, C).to(tl.int32)
    row, row_q = token * H + h, token * (H * R) + h * R
    state = (chunk * H + h).to(tl.int64) * M
    gates = row * M
    found = load_levels(levels, chunk * H + h, SLICES)

    carried = tl.zeros([C, BM], tl.float32)
    if not LINEAR:
        carried = _key_gradients(
            carried, q + row_q * K, k + row * K, dhk + state * K, dk + row * K, read_dl + row_q * M, dl + row_q * M,
            key_scale, g + gates, s + gates, until + gates, shrunk + gates, kept + gates, level + gates, found, left,
            K, H, R, M, C, BD, BM, RANGE, HAS_S, DOT, PRECISION,
        )  # fmt: skip
    carried = _key_gradients(
        carried, do + row_q * V, v + row * V, dhv + state * V, dv + row * V, read_p + row_q * M, p + row_q * M,
        value_scale, g + gates, s + gates, until + gates, shrunk + gates, kept + gates, level + gates, found, left,
        V, H, R, M, C, BD, BM, RANGE, HAS_S, DOT, PRECISION,
    )  # fmt: skip

    om = tl.arange(0, BM)
    sums = load_rows(until + gates, left, 0, C, H * M, M, BM)
    last = tl.load(until + gates + (left - 1) * (H * M) + om, mask=om < M, other=0.0)
    carried = carried * tl.exp((last[None, :] - sums).to(tl.float32))
    later = load_write(g + gates, s + gates, left, C, H, M, BM, HAS_S) * carried
    through = tl.zeros([BM], tl.float32)
    for i in range(PARTS):
        through += tl.load(passed + ((chunk * H + h).to(tl.int64) * PARTS + i) * M + om, mask=om < M, other=0.0)
    total = sums_over_tokens(later, C, False, DOT) - later + (through * tl.exp(last.to(tl.float32)))[None, :]
    total += load_rows(dg + gates, left, 0, C, H * M, M, BM)
    if HAS_S:
        carried += load_rows(dwrite + gates, left, 0, C, H * M, M, BM)
        store_rows(ds + gates, carried, left, 0, C, H * M, M, BM)
    else:
        total -= tl.exp(load_rows(g + gates, left, 0, C, H * M, M, BM).to(tl.float32)) * carried
    store_rows(dg + gates, total, left, 0, C, H * M, M, BM)


@triton.jit
def _key_gradients(
    carried, y, x, dh, dx, read, weights, factor, g, s, until, shrunk, kept, level, levels, left,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One half, (x, y) = (k, q) or (v, do): dx_j = factor · Σ_{t≥j} near_tj y_t + kept_j dh; carried + x dhᵀ."""
    if R == 1:
        near = near_attention_transposed(
            read, weights, g, s, until, shrunk, level, levels, left, C, H, R, M, BM, RANGE, HAS_S, DOT, PRECISION
        )
    written = load_rows(kept, left, 0, C, H * M, M, BM).to(DOT)
    for d in range(0, D, BD):
        dhd = load_rows(dh, M, d, BM, D, D, BD).to(DOT)
        xd = load_rows(x, left, d, C, H * D, D, BD)
        carried = tl.dot(xd.to(DOT), tl.trans(dhd), carried, input_precision=PRECISION)
        if R == 1:
            yd = load_rows(y, left, d, C, H * D, D, BD)
            out = tl.dot(near, yd.to(DOT), input_precision=PRECISION)
        else:
            out = tl.zeros([C, BD], tl.float32)
            for r in range(R):
                near = near_attention_transposed(
                    read + r * M, weights + r * M, g, s, until, shrunk, level, levels, left,
                    C, H, R, M, BM, RANGE, HAS_S, DOT, PRECISION,
                )  # fmt: skip
                yd = load_rows(y + r * D, left, d, C, H * R * D, D, BD)
                out = tl.dot(near, yd.to(DOT), out, input_precision=PRECISION)
        out = tl.dot(written, dhd, out * factor, input_precision=PRECISION)
        store_rows(dx, out, left, d, C, H * D, D, BD)
    return carried
