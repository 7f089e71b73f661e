"""Backward kernels.

With dp_t = Ṽ_t do_t the gradient of the softmax's output and dℓ = p ∘ (dp - Σ_m p dp), one chunk at a time, G and the
sums below running through the whole chunk:

    values:    dp_t = e^{G_t} ∘ (do_t Ṽ₀ᵀ) + Σ_{j≤t} (do_t·v_j) s_j e^{G_t-G_j}              (pass 1 with do, v, Ṽ)
    states:    dK̃₀  = e^{G_C} ∘ dK̃₁ + Σ_t (dℓ_t e^{G_t}) ⊗ q_t                 (Ṽ likewise with p, do), last chunk first
    inputs:    dq_t = (dℓ_t ∘ e^{G_t}) K̃₀ + Σ_{j≤t} b_tj k_j,  b_tj = Σ_m dℓ_tm s_jm e^{G_tm-G_jm}   (pass 2)
               dk_j = Σ_{t≥j} b_tj q_t + (s_j e^{G_C-G_j}) dK̃₁                     (dv_j with a_tj, do_t, dṼ₁)
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
    load_levels,
    load_rows,
    load_sum,
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
    q, v, g, s, until, shrunk, kept, level, levels, hv, p, lse, do, dq, dl, read_p, read_dl, dgate, dwrite, cu_seqlens,
    chunk_sequence, first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr,
    PACKED: tl.constexpr, SLICES: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 2 backward: read_p = p ∘ e^G, read_dl = dℓ ∘ e^G and dℓ [·, HQ, M] (dℓ only where levels above 0 occur).

    In float32 [·, H, M] its share of dg from inside the chunk, dgate, and where s is given of ds, dwrite.
    LINEAR: q takes the place of p, and scale · dp is its gradient. Grid: (chunks·H,).
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    h = program % H
    chunk = time_order(program // H, T, sequences, C, PACKED, False)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    whole = tl.minimum(end - start, C).to(tl.int32)
    state = (chunk * H + h).to(tl.int64) * M
    ot = tl.arange(0, BT)
    for place in range(tl.cdiv(whole, BT)):
        before = place * BT
        token, left = start + before, whole - before
        row, row_q = token * H + h, token * (H * R) + h * R
        gates = row * M
        found = load_levels(levels, (chunk * BLOCKS + place) * H + h, SLICES)
        passed = tl.exp(load_sum(until + gates, -1, place > 0, H, M, BM))

        total = tl.zeros([BT, BM], tl.float32)
        written = tl.zeros([BT, BM], tl.float32)
        across = tl.zeros([BT, BM], tl.float32)
        for r in range(R):
            at = (row_q + r) * M
            scores, far, old = products(
                do + (row_q + r) * V, v + row * V, hv + state * V, kept + gates, passed, left, before, scale,
                BT, C, H * R * V, H * V, V, BD, H, M, BM, DOT, PRECISION,
            )  # fmt: skip
            dp = near_logits(
                scores, old, g + gates, s + gates, until + gates, shrunk + gates, level + gates, found, left,
                BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
            grown = tl.exp(load_rows(until + gates, left, 0, BT, H * M, M, BM).to(tl.float32))
            if LINEAR:
                weight = load_rows(q + at, left, 0, BT, H * R * M, M, BM).to(tl.float32)
                store_rows(dq + at, dp, left, 0, BT, H * R * M, M, BM)
            else:
                weight = load_rows(p + at, left, 0, BT, H * R * M, M, BM).to(tl.float32)
                dlogits = weight * (dp - tl.sum(weight * dp, axis=1)[:, None])
                sums = tl.load(lse + row_q + r + ot * (H * R), mask=ot < left, other=0.0)
                z = tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)) + sums[:, None], 0.0)
                total += dlogits * z
                store_rows(read_dl + at, dlogits * grown, left, 0, BT, H * R * M, M, BM)
                if found > 0:
                    store_rows(dl + at, dlogits, left, 0, BT, H * R * M, M, BM)
            total += weight * dp
            reading = (weight * grown).to(DOT)
            store_rows(read_p + at, reading, left, 0, BT, H * R * M, M, BM)
            written += near_writes(
                tl.trans(scores), reading, weight, until + gates, level + gates, found, left,
                BT, H, M, BM, RANGE, DOT, PRECISION,
            )  # fmt: skip
            if C > BT:
                across = tl.dot(tl.trans(far), reading, across, input_precision=PRECISION)

        whole_block = _add_gates(
            g + gates, s + gates, dgate + gates, dwrite + gates, total, written, left, False,
            BT, H, M, BM, HAS_S, DOT,
        )  # fmt: skip
        if C > BT:
            if place > 0:
                # The block before: what its tokens wrote was read here, and its gates act on all that reads here.
                tl.debug_barrier()
                there = gates - BT * H * M
                rest = load_sum(until + there, BT - 1, True, H, M, BM)[None, :]
                rest -= load_rows(until + there, BT, 0, BT, H * M, M, BM).to(tl.float32)
                reaches = tl.where((ot == BT - 1)[:, None], whole_block[None, :], 0.0)
                _add_gates(
                    g + there, s + there, dgate + there, dwrite + there, reaches, across * tl.exp(rest), BT, True,
                    BT, H, M, BM, HAS_S, DOT,
                )  # fmt: skip


@triton.jit
def _add_gates(
    g, s, dg, ds, reached, written, left, MORE: tl.constexpr,
    BT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dg_i = Σ_{t≥i} (reached_t - s_t written_t) over the block's tokens, and ds = written, which where s is derived
    goes through it into dg. MORE: added to what is there. Gives the sum over the whole block [BM]."""
    onward = reached - load_write(g, s, left, BT, H, M, BM, HAS_S) * written
    total = sums_over_tokens(onward, BT, True, DOT)
    if HAS_S:
        if MORE:
            written += load_rows(ds, left, 0, BT, H * M, M, BM)
        store_rows(ds, written, left, 0, BT, H * M, M, BM)
    else:
        total -= tl.exp(load_rows(g, left, 0, BT, H * M, M, BM).to(tl.float32)) * written
    if MORE:
        total += load_rows(dg, left, 0, BT, H * M, M, BM)
    store_rows(dg, total, left, 0, BT, H * M, M, BM)
    return tl.sum(onward, axis=0)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def states_backward(
    q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, dhk0, dhv0, local_k, local_v, decay,
    cu_seqlens, segment_sequence, first_segment, first_chunk, T, sequences, segment_chunks, key_scale, value_scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr,
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

    BLOCKS: tl.constexpr = C // BT
    ot, om = tl.arange(0, BT), tl.arange(0, BM)
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

    steps = tl.minimum(tl.cdiv(end - start, BT), segment_chunks * BLOCKS).to(tl.int32)
    all_gates = tl.zeros([BM], tl.float32)
    if not LOCAL:
        before = tl.load(
            states + ((chunk + (steps - 1) // BLOCKS) * H + h) * one + at_state, mask=inside, other=0.0
        )
    for back in range(steps):
        i = steps - 1 - back
        token = start + i * BT
        left = end - token
        if not LOCAL:
            # Only at the last block of each chunk; by masks, since a branch would end the pipelining of loads.
            turn = (i % BLOCKS == BLOCKS - 1) | (back == 0)
            here = (chunk + i // BLOCKS) * H + h
            tl.store(
                out + here * one + at_state,
                state.to(out.dtype.element_ty),
                mask=inside & (od[None, :] < tl.where(turn, size, 0)),
            )
            product = tl.sum(state * before.to(tl.float32), axis=1)
            tl.store(passed + (here.to(tl.int64) * PARTS + part) * M + om, product, mask=om < tl.where(turn, M, 0))
            # The state before the next turn's chunk, loaded a turn ahead.
            before = tl.load(
                states + ((chunk + (i - 1) // BLOCKS) * H + h) * one + at_state,
                mask=inside & (od[None, :] < tl.where((i > 0) & (i % BLOCKS == 0), size, 0)),
                other=0.0,
            )
        last = until + ((token + tl.minimum(left, BT) - 1) * H + h) * M
        total = tl.load(last + om, mask=slot, other=0.0).to(tl.float32)
        state = state * tl.exp(total)[:, None]
        all_gates += total
        for r in range(R):
            row_q = token * (H * R) + h * R + r
            weight = load_rows(y + row_q * M, left, 0, BT, H * R * M, M, BM)
            values = tl.load(
                x + row_q * size + ot[:, None] * (H * R * size) + od[None, :],
                mask=(ot < left)[:, None] & (od[None, :] < size),
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
def inputs_backward(
    q, k, v, g, s, until, shrunk, kept, level, levels, do, p, dl, read_p, read_dl, dwrite, passed, hk, dhk, dhv, dq, dk,
    dv, ds, dg, cu_seqlens, chunk_sequence, first_chunk, T, sequences, key_scale, value_scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr,
    PACKED: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [·, HQ, K], dk [·, H, K], dv [·, H, V] and, where s is given, ds [·, H, M] of one chunk and kv head, block
    after block; completes dg, which holds dgate.

    LINEAR: p is q, and the second pass alone is done. Grid: (chunks·H,).
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    h = program % H
    chunk = time_order(program // H, T, sequences, C, PACKED, False)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, _, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    whole = tl.minimum(end - start, C).to(tl.int32)
    state = (chunk * H + h).to(tl.int64) * M

    om = tl.arange(0, BM)
    earlier = tl.zeros([BM], tl.float32)
    for i in range(PARTS):
        earlier += tl.load(passed + ((chunk * H + h).to(tl.int64) * PARTS + i) * M + om, mask=om < M, other=0.0)
    all_gates = load_sum(until + (start * H + h) * M, whole - 1, True, H, M, BM)
    if C > BT:
        all_gates += load_sum(until + (start * H + h) * M, BT - 1, whole > BT, H, M, BM)
    earlier *= tl.exp(all_gates)
    for place in range(tl.cdiv(whole, BT)):
        before = place * BT
        token, left = start + before, whole - before
        row, row_q = token * H + h, token * (H * R) + h * R
        gates = row * M
        found = load_levels(levels, (chunk * BLOCKS + place) * H + h, SLICES)

        carried = tl.zeros([BT, BM], tl.float32)
        written = tl.zeros([BT, BM], tl.float32)
        if not LINEAR:
            carried, written = _half(
                carried, written, q + row_q * K, k + row * K, dhk + state * K, dk + row * K, read_dl + row_q * M,
                dl + row_q * M, key_scale, g + gates, s + gates, until + gates, shrunk + gates, kept + gates,
                level + gates, found, left, K, H, R, M, C, BT, BD, BM, RANGE, HAS_S, True, DOT, PRECISION,
            )  # fmt: skip
            _queries(
                k + row * K, hk + state * K, dq + row_q * K, read_dl + row_q * M, dl + row_q * M, key_scale,
                g + gates, s + gates, until + gates, shrunk + gates, kept + gates, level + gates, found, left, before,
                K, H, R, M, C, BT, BD, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
        carried, written = _half(
            carried, written, do + row_q * V, v + row * V, dhv + state * V, dv + row * V, read_p + row_q * M,
            p + row_q * M, value_scale, g + gates, s + gates, until + gates, shrunk + gates, kept + gates,
            level + gates, found, left, V, H, R, M, C, BT, BD, BM, RANGE, HAS_S, False, DOT, PRECISION,
        )  # fmt: skip

        rest = load_sum(until + gates, tl.minimum(left, BT) - 1, True, H, M, BM)[None, :]
        rest -= load_rows(until + gates, left, 0, BT, H * M, M, BM).to(tl.float32)
        if C > BT:
            rest += load_sum(until + gates, left - 1, left > BT, H, M, BM)[None, :]
        carried *= tl.exp(rest)
        write = load_write(g + gates, s + gates, left, BT, H, M, BM, HAS_S)
        later = write * carried
        total = sums_over_tokens(later, BT, False, DOT) - later + earlier[None, :]
        if not LINEAR:
            onward = write * written
            total -= sums_over_tokens(onward, BT, True, DOT)
        if HAS_S:
            among = load_rows(dwrite + gates, left, 0, BT, H * M, M, BM)
            store_rows(ds + gates, among + carried + written, left, 0, BT, H * M, M, BM)
        else:
            decay = tl.exp(load_rows(g + gates, left, 0, BT, H * M, M, BM).to(tl.float32))
            total -= decay * (carried + written)
        total += load_rows(dg + gates, left, 0, BT, H * M, M, BM)
        store_rows(dg + gates, total, left, 0, BT, H * M, M, BM)
        if C > BT:
            earlier += tl.sum(later, axis=0)
            if not LINEAR:
                if place > 0:
                    tl.debug_barrier()
                    there = dg + gates - BT * H * M
                    total = load_rows(there, BT, 0, BT, H * M, M, BM) - tl.sum(onward, axis=0)[None, :]
                    store_rows(there, total, BT, 0, BT, H * M, M, BM)


@triton.jit
def _half(
    carried, written, y, x, dh, dx, read, weights, factor, g, s, until, shrunk, kept, level, levels, left,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, WRITES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass, (x, y) = (k, q) or (v, do): dx_j = factor · Σ_{t≥j} near_jt y_t + kept_j dh, t up to the chunk's end.

    Also carried + x dhᵀ, and if WRITES written + what factor · Σ_{t≥j} (x_j·y_t) weights_t adds to ds in the chunk.
    """
    after = left - BT
    keeping = load_rows(kept, left, 0, BT, H * M, M, BM)
    writing = keeping.to(DOT)
    if C > BT:
        passed = tl.exp(load_sum(until, left - 1, after > 0, H, M, BM))
        writing = (keeping.to(tl.float32) * passed[None, :]).to(DOT)
    keeping = keeping.to(DOT)
    if R == 1:
        near, far = _weights(
            keeping, read, weights, g, s, until, shrunk, level, levels, left,
            H, R, M, C, BT, BM, RANGE, HAS_S, DOT, PRECISION,
        )  # fmt: skip
        scores = tl.zeros([BT, BT], tl.float32)
        far_scores = tl.zeros([BT, BT], tl.float32)
    for d in range(0, D, BD):
        dhd = load_rows(dh, M, d, BM, D, D, BD).to(DOT)
        xd = load_rows(x, left, d, BT, H * D, D, BD)
        carried = tl.dot(xd.to(DOT), tl.trans(dhd), carried, input_precision=PRECISION)
        out = tl.zeros([BT, BD], tl.float32)
        for r in tl.static_range(R):
            if R > 1:
                near, far = _weights(
                    keeping, read + r * M, weights + r * M, g, s, until, shrunk, level, levels, left,
                    H, R, M, C, BT, BM, RANGE, HAS_S, DOT, PRECISION,
                )  # fmt: skip
            yd = load_rows(y + r * D, left, d, BT, H * R * D, D, BD)
            out = tl.dot(near, yd.to(DOT), out, input_precision=PRECISION)
            if WRITES and R == 1:
                scores = tl.dot(xd, tl.trans(yd), scores, input_precision=PRECISION)
            if C > BT:
                zd = load_rows(y + r * D + BT * H * R * D, after, d, BT, H * R * D, D, BD)
                out = tl.dot(far, zd.to(DOT), out, input_precision=PRECISION)
                if WRITES and R == 1:
                    far_scores = tl.dot(xd, tl.trans(zd), far_scores, input_precision=PRECISION)
        out = tl.dot(writing, dhd, out * factor, input_precision=PRECISION)
        store_rows(dx, out, left, d, BT, H * D, D, BD)
    if WRITES:
        for r in range(R):
            if R > 1:
                scores = tl.zeros([BT, BT], tl.float32)
                far_scores = tl.zeros([BT, BT], tl.float32)
                for d in range(0, D, BD):
                    xd = load_rows(x, left, d, BT, H * D, D, BD)
                    yd = load_rows(y + r * D, left, d, BT, H * R * D, D, BD)
                    scores = tl.dot(xd, tl.trans(yd), scores, input_precision=PRECISION)
                    if C > BT:
                        zd = load_rows(y + r * D + BT * H * R * D, after, d, BT, H * R * D, D, BD)
                        far_scores = tl.dot(xd, tl.trans(zd), far_scores, input_precision=PRECISION)
            oj = tl.arange(0, BT)
            inside = tl.where(oj[None, :] >= oj[:, None], scores * factor, 0.0).to(DOT)
            reading = load_rows(read + r * M, left, 0, BT, H * R * M, M, BM).to(DOT)
            weight = reading
            if levels > 0:
                weight = load_rows(weights + r * M, left, 0, BT, H * R * M, M, BM).to(DOT)
            written += near_writes(
                inside, reading, weight, until, level, levels, left, BT, H, M, BM, RANGE, DOT, PRECISION
            )
            if C > BT:
                reading = load_rows(read + r * M + BT * H * R * M, after, 0, BT, H * R * M, M, BM).to(DOT)
                sums = load_rows(until, left, 0, BT, H * M, M, BM).to(tl.float32)
                rest = load_sum(until, BT - 1, after > 0, H, M, BM)[None, :] - sums
                beyond = tl.dot((far_scores * factor).to(DOT), reading, input_precision=PRECISION)
                written += tl.where(after > 0, tl.exp(rest) * beyond, 0.0)
    return carried, written


@triton.jit
def _weights(
    keeping, read, weights, g, s, until, shrunk, level, levels, left,
    H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    RANGE: tl.constexpr, HAS_S: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With what the tokens j of a block meet those t of the same and of the next block: two times [BT (j), BT (t)]."""
    near = near_attention_transposed(
        read, weights, g, s, until, shrunk, level, levels, left,
        BT, H, R, M, BM, RANGE, HAS_S, DOT, PRECISION,
    )  # fmt: skip
    far = near
    if C > BT:
        reading = load_rows(read + BT * H * R * M, left - BT, 0, BT, H * R * M, M, BM).to(DOT)
        far = tl.dot(keeping, tl.trans(reading), input_precision=PRECISION).to(DOT)
    return near, far


@triton.jit
def _queries(
    k, hk, dq, read, weights, factor, g, s, until, shrunk, kept, level, levels, left, before,
    K: tl.constexpr, H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block."""
    passed = tl.exp(load_sum(until, -1, before > 0, H, M, BM))
    for r in range(R):
        reading = load_rows(read + r * M, left, 0, BT, H * R * M, M, BM)
        if levels > 0:
            weight = load_rows(weights + r * M, left, 0, BT, H * R * M, M, BM).to(tl.float32)
            near = near_attention_any(
                reading.to(DOT), weight, g, s, until, shrunk, level, levels, left,
                BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
        else:
            near = near_attention(reading.to(DOT), shrunk, left, BT, H, M, BM, DOT, PRECISION)
        write_products(
            near, k, reading.to(tl.float32), hk, dq + r * K, kept, passed, left, before, factor,
            BT, C, H * K, H * R * K, K, BD, H, M, BM, DOT, PRECISION,
        )  # fmt: skip
