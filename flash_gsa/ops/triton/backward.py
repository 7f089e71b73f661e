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

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .chunks import (
    blocks_that_last,
    exp,
    fast_exp,
    from_start,
    lay_out_by_16,
    load_end,
    load_levels,
    load_rows,
    load_sum,
    load_write,
    locate,
    mm,
    near_attention,
    near_attention_any,
    near_logits,
    near_logits_any,
    near_writes,
    one_minus_exp,
    passing,
    place_before,
    place_behind,
    products,
    store_rows,
    sums_before_and_from,
    time_order,
    to_end,
)

# The interpreter knows nothing of libdevice.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SMALLEST = tl.constexpr(1.1754944e-38)  # the smallest normal number of float32


@triton.jit(do_not_specialize=["T", "sequences"])
def values_backward(
    q, v, g, s, until, scaled, levels, hv, p, lse, do, dq, dl, read_p, read_dl, reached, cu_seqlens,
    chunk_sequence, first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr,
    PACKED: tl.constexpr, SLICES: tl.constexpr, HAS_INITIAL: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass 2 backward: read_p = p ∘ e^G, read_dl = dℓ ∘ e^G and dℓ [·, HQ, M] (dℓ only where levels above 0 occur);
    reached = dℓ ∘ ℓ + p ∘ dp [·, H, M] in float32, summed over the query heads of a group.

    LINEAR: q takes the place of p, and scale · dp is its gradient. Grid: (chunks·C/BT·H,).
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    h, place = program % H, program // H % BLOCKS
    chunk = time_order(program // (H * BLOCKS), T, sequences, C, PACKED, False)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    n, index, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    token, before = start + place * BT, place * BT
    if token >= end:
        return
    left = tl.minimum(end - token, C).to(tl.int32)
    row, row_q = token * H + h, token * (H * R) + h * R
    state = (place_before(chunk, n, HAS_INITIAL) * H + h).to(tl.int64) * M
    slots = tl.where((index > 0) | HAS_INITIAL, M, 0)  # that there are of the state
    gates = row * M
    block = (chunk * BLOCKS + place) * H + h
    found = load_levels(levels, block, True, SLICES)
    found_before = 0
    if C > BT:
        found_before = load_levels(levels, block - H, place > 0, SLICES)

    g, s, until, scaled = g + gates, s + gates, until + gates, scaled + gates
    if (found | found_before) > 0:
        _of_values_any(
            q, v + row * V, g, s, until, scaled, hv + state * V, slots, p, lse, do, dq, dl, read_p, read_dl,
            reached + gates, row_q, found, left, before, scale,
            H, R, V, M, C, BT, BD, BM, RANGE, HAS_S, LINEAR, DOT, PRECISION,
        )  # fmt: skip
    else:
        _of_values(
            q, v + row * V, g, s, until, scaled, hv + state * V, slots, p, lse, do, dq, dl, read_p, read_dl,
            reached + gates, row_q, found, left, before, scale,
            H, R, V, M, C, BT, BD, BM, RANGE, HAS_S, LINEAR, False, DOT, PRECISION,
        )  # fmt: skip


@triton.jit(noinline=True)
def _of_values_any(
    q, v, g, s, until, scaled, hv, slots, p, lse, do, dq, dl, read_p, read_dl, reached, row, levels, left, before,
    scale,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_of_values` with ANY: not inlined, see `_of_inputs_any`."""
    _of_values(
        q, v, g, s, until, scaled, hv, slots, p, lse, do, dq, dl, read_p, read_dl, reached, row, levels, left, before,
        scale,
        H, R, V, M, C, BT, BD, BM, RANGE, HAS_S, LINEAR, True, DOT, PRECISION,
    )  # fmt: skip


@triton.jit
def _of_values(
    q, v, g, s, until, scaled, hv, slots, p, lse, do, dq, dl, read_p, read_dl, reached, row, levels, left, before,
    scale,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, LINEAR: tl.constexpr,
    ANY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`values_backward` of the query heads from `row` on; ANY: with levels above 0 in the block or the one before."""
    lay_out_by_16(scaled, left, BT, BM)
    ot = tl.arange(0, BT)
    early, late = passing(load_sum(until, -1, before > 0, H, M, BM), ANY, RANGE)
    own = load_rows(scaled, left, 0, BT, H * M, M, BM).to(DOT)
    scaled_before = own
    if C > BT:
        scaled_before = load_rows(scaled - BT * (H * M), before, 0, BT, H * M, M, BM).to(DOT)
    grown = fast_exp(load_rows(until, left, 0, BT, H * M, M, BM))
    total = tl.zeros([BT, BM], tl.float32)
    for r in range(R):
        at = (row + r) * M
        # Before the loop over slices, although needed after it: there nothing would hide how long loads take.
        weight = load_rows(q + at if LINEAR else p + at, left, 0, BT, H * R * M, M, BM)
        if not LINEAR:
            sums = tl.load(lse + row + r + ot * (H * R), mask=ot < left, other=0.0)
        scores, old = products(
            do + (row + r) * V, v, hv, slots, scaled_before, early, late, left, before, scale,
            BT, C, H * R * V, H * V, V, BD, M, BM, DOT, PRECISION,
        )  # fmt: skip
        weak = own
        if ANY:
            weak = from_start(own, g, s, until, left, BT, H, M, BM, RANGE, HAS_S, DOT)
            dp = near_logits_any(
                scores, old, grown, weak, g, s, until, levels, left,
                BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
        else:
            dp = near_logits(scores, old, grown, weak, PRECISION)
        weight = weight.to(tl.float32)
        if LINEAR:
            store_rows(dq + at, dp, left, 0, BT, H * R * M, M, BM)
        else:
            # p was rounded: divided by its sum, its mean of dp is exact for what all slots have in common.
            mean = tl.sum(weight * dp, axis=1) / tl.maximum(tl.sum(weight, axis=1), 1e-30)
            dlogits = weight * (dp - mean[:, None])
            # p of 0 has no logarithm, and no share in dlogits either.
            positive = tl.maximum(weight, SMALLEST)
            if INTERPRETED or PRECISION == "ieee":
                logits = tl.log(positive) + sums[:, None]
            else:
                logits = libdevice.fast_logf(positive) + sums[:, None]  # a tenth of the instructions
            total += dlogits * logits
            store_rows(read_dl + at, dlogits * grown, left, 0, BT, H * R * M, M, BM)
            if ANY:
                store_rows(dl + at, dlogits, left, 0, BT, H * R * M, M, BM)
        total += weight * dp
        store_rows(read_p + at, weight * grown, left, 0, BT, H * R * M, M, BM)
    store_rows(reached, total, left, 0, BT, H * M, M, BM)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def states_backward(
    q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, dhk0, dhv0, local_k, local_v, decay,
    cu_seqlens, segment_sequence, first_segment, first_chunk, T, sequences, segment_chunks, key_scale, value_scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    WANT_INITIAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dhk, dhv [·, H, M, K | V]: gradients of both states after each chunk (`place_behind`); dhk0, dhv0 of the initial
    ones; passed [chunks, H, slices, M]: ⟨dhk, hk⟩, ⟨dhv, hv⟩ over each slice, of chunks that have both. dhv may be the
    memory of hv.

    The mirror of `states_forward`, walking a segment from its last chunk to its first; LOCAL: of every segment but
    a sequence's first, from the last block on that is read through the gates before it.
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
    stretch = (start // span).to(tl.int32)
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
                after = (stretch + behind - 1 - segment - i) * H + h  # the sequence's last segment first
                gates = tl.load(decay + after.to(tl.int64) * M + om, mask=slot, other=0.0)
                state = state * tl.exp(gates)[:, None]
                state += tl.load(local + after * one + at_state, mask=inside, other=0.0)

    chunks = tl.minimum(tl.cdiv(end - start, C), segment_chunks).to(tl.int32)
    all_gates = tl.zeros([BM], tl.float32)
    sums = until + (start * H + h) * M
    if LOCAL:
        blocks = tl.minimum(tl.cdiv(end - start, BT), segment_chunks * BLOCKS).to(tl.int32)
        lasting = blocks_that_last(sums, blocks, (end - start).to(tl.int32), False, BT, H, M, BM)
        chunks = tl.cdiv(lasting, BLOCKS)
    turns = chunks
    if not LOCAL:
        # What a sequence's first chunk reads counts for the initial state alone. Where dhv lies over hv, a program must
        # write where it alone reads: the gradient before its first chunk and not that behind its last, or the reverse.
        whole = ((index == 0) & WANT_INITIAL) | ((index > 0) & (not HAS_FINAL))
        turns = tl.where(whole, chunks, chunks - 1)
        states += (place_before(chunk, n, HAS_INITIAL) * H + h) * one
        out += (place_behind(chunk, n, HAS_FINAL) * H + h) * one
        from_first = (index > 0) | HAS_INITIAL  # whether there is a state before the segment's first chunk
        last = chunks - 1
        if HAS_FINAL or SPLIT:  # else nothing is behind the last chunk
            begun = (last > 0) | ((last == 0) & from_first)
            before = tl.load(
                states + last * H * one + at_state, mask=inside & (od[None, :] < tl.where(begun, size, 0)), other=0.0
            )
            product = tl.sum(state * before.to(tl.float32), axis=1)
            at_passed = passed + (((chunk + last) * H + h).to(tl.int64) * PARTS + part) * M + om
            tl.store(at_passed, product, mask=om < tl.where(begun, M, 0))
            if HAS_FINAL:
                tl.debug_barrier()  # `out` may be where `before` has been loaded
                there = inside & (od[None, :] < tl.where(chunks > 0, size, 0))
                tl.store(out + last * H * one + at_state, state.to(out.dtype.element_ty), mask=there)
    sums += (chunks - 1).to(tl.int64) * (C * H * M)
    left = tl.where(chunks > 0, end - start - (chunks - 1) * C, 0)
    next_total = load_end(sums, left, BT, H, M, BM)
    next_total_1 = next_total
    if BLOCKS > 1:
        next_total_1 = load_end(sums + BT * H * M, left - BT, BT, H, M, BM)
    for back in range(turns):
        i = chunks - 1 - back
        token = start + i * C
        left = end - token
        if not LOCAL:
            # The state before the chunk before: well before its use, like gates at the ends of that chunk's blocks.
            begun = (i > 1) | ((i == 1) & from_first)
            before = tl.load(
                states + (i - 1) * H * one + at_state, mask=inside & (od[None, :] < tl.where(begun, size, 0)), other=0.0
            )
        total, total_1 = next_total.to(tl.float32), next_total_1.to(tl.float32)
        sums -= C * H * M
        next_left = tl.where(i > 0, left + C, 0)
        next_total = load_end(sums, next_left, BT, H, M, BM)
        if BLOCKS > 1:
            next_total_1 = load_end(sums + BT * H * M, next_left - BT, BT, H, M, BM)
        for turn in tl.static_range(BLOCKS):
            if turn < BLOCKS - 1:
                factors = total_1
            else:
                factors = total
            state = state * tl.exp(factors)[:, None]
            all_gates += factors
            for r in range(R):
                row_q = (token + (BLOCKS - 1 - turn) * BT) * (H * R) + h * R + r
                weight = load_rows(y + row_q * M, left - (BLOCKS - 1 - turn) * BT, 0, BT, H * R * M, M, BM)
                values = tl.load(
                    x + row_q * size + ot[:, None] * (H * R * size) + od[None, :],
                    mask=(ot < left - (BLOCKS - 1 - turn) * BT)[:, None] & (od[None, :] < size),
                    other=0.0,
                )
                addition = mm(tl.trans(weight.to(DOT)), values.to(DOT), PRECISION=PRECISION)
                state += addition * factor
        if not LOCAL:
            there = inside
            if WANT_INITIAL or SPLIT:
                there = inside & (od[None, :] < tl.where((i > 0) | (index > 0), size, 0))
            tl.store(out + (i - 1) * H * one + at_state, state.to(out.dtype.element_ty), mask=there)
            product = tl.sum(state * before.to(tl.float32), axis=1)
            at_passed = passed + (((chunk + i - 1) * H + h).to(tl.int64) * PARTS + part) * M + om
            tl.store(at_passed, product, mask=om < tl.where(begun, M, 0))
    if LOCAL:
        here = stretch * H + h
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
    y, x, h, dh, read, weights, g, s, until, scaled, levels, dy, dx, written_sum, carried_sum, cu_seqlens,
    chunk_sequence, first_chunk, T, sequences, factor,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr,
    PACKED: tl.constexpr, SLICES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    QUERIES: tl.constexpr, FIRST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass, (x, y) = (k, q) or (v, do), of one block and kv head. With near_tj what token t reads of j, read_t what
    it reads of the state before the chunk and kept_j what the state behind it has of j:

    dx_j = factor · Σ_{t≥j} near_tj y_t + kept_j dh;  QUERIES: dy_t = factor · (Σ_{j≤t} near_tj x_j + read_t h)

    t up to the chunk's end and j from its start, dx [·, H, D], dy [·, HQ, D]. Both parts of ds [·, H, M] for
    `gates_backward`, that from tokens of the chunk and that from the state behind it: written_sum and carried_sum,
    begun by the FIRST pass.

    Every slice of x and y is read once: until a second time, other programs read more than the L2 cache holds.
    Grid: (chunks·C/BT·H,), the blocks of a chunk next to each other, so that what both read comes from L2.
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    head, place = program % H, program // H % BLOCKS
    chunk = time_order(program // (H * BLOCKS), T, sequences, C, PACKED, not FIRST)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    n, index, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    token, before = start + place * BT, place * BT
    if token >= end:
        return
    left = tl.minimum(end - token, C - before).to(tl.int32)
    row, row_q = token * H + head, token * (H * R) + head * R
    h += (place_before(chunk, n, HAS_INITIAL) * H + head).to(tl.int64) * (M * D)
    dh += (place_behind(chunk, n, HAS_FINAL) * H + head).to(tl.int64) * (M * D)
    slots = tl.where((index > 0) | HAS_INITIAL, M, 0)  # that there are of the state before the chunk
    slots_behind = tl.where((end - start > C) | HAS_FINAL, M, 0)
    block = (chunk * BLOCKS + place) * H + head
    found = load_levels(levels, block, True, SLICES)
    found_before = 0
    if C > BT:
        found_before = load_levels(levels, block - H, place > 0, SLICES)
    gates = row * M
    g, s, until, scaled = g + gates, s + gates, until + gates, scaled + gates
    y, x, dx = y + row_q * D, x + row * D, dx + row * D
    read, weights = read + row_q * M, weights + row_q * M

    # Here and not where it is used: from outside of a condition it comes through shared memory, and leaves registers.
    writing = _writing(scaled, until, left, H, M, C, BT, BM, RANGE, DOT)
    if (found | found_before) > 0:
        _of_inputs_any(
            y, x, h, dh, slots, slots_behind, read, weights, g, s, until, scaled, dy, dx, written_sum + gates,
            carried_sum + gates, row_q, found, left, before, factor,
            H, R, D, M, C, BT, BD, BM, RANGE, HAS_S, QUERIES, FIRST, DOT, PRECISION,
        )  # fmt: skip
    if (found | found_before) == 0:
        _of_inputs(
            y, x, h, dh, slots, slots_behind, read, weights, g, s, until, scaled, dy, dx, written_sum + gates,
            carried_sum + gates, writing, row_q, found, left, before, factor,
            H, R, D, M, C, BT, BD, BM, RANGE, HAS_S, QUERIES, FIRST, False, DOT, PRECISION,
        )  # fmt: skip


@triton.jit
def _writing(
    scaled, until, left, H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    RANGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What the state behind the chunk has of the block's tokens [BT, BM]."""
    own = load_rows(scaled, left, 0, BT, H * M, M, BM)
    carrying = to_end(load_sum(until, tl.minimum(left, BT) - 1, True, H, M, BM), RANGE)
    if C > BT:
        carrying *= exp(load_sum(until, left - 1, left > BT, H, M, BM))
    return (own.to(tl.float32) * carrying[None, :]).to(own.dtype).to(DOT)


@triton.jit(noinline=True)
def _of_inputs_any(
    y, x, h, dh, slots, slots_behind, read, weights, g, s, until, scaled, dy, dx, written_sum, carried_sum, row,
    levels, left, before, factor,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, QUERIES: tl.constexpr,
    FIRST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_of_inputs` with ANY, as a function of its own. Inlined, the compiler would move what both have in common to
    before their condition, where it fills the registers of what nearly every block takes."""
    writing = _writing(scaled, until, left, H, M, C, BT, BM, RANGE, DOT)
    _of_inputs(
        y, x, h, dh, slots, slots_behind, read, weights, g, s, until, scaled, dy, dx, written_sum,
        carried_sum, writing, row, levels, left, before, factor,
        H, R, D, M, C, BT, BD, BM, RANGE, HAS_S, QUERIES, FIRST, True, DOT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "sequences"])
def gates_backward(
    g, s, until, passed, written, carried, dg, ds, cu_seqlens, chunk_sequence, first_chunk, T, sequences,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, HAS_S: tl.constexpr, PACKED: tl.constexpr,
    SLICES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, BS: tl.constexpr, PARTS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """ds = written + carried [·, H, M], and dg [·, H, M], which holds what `values_backward` calls reached: of one
    chunk, a head and a slice of BS slots. Where s is derived from g, its gradient becomes part of dg.

    Grid: (chunks·H·SLICES,).
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    part, h, chunk = program % SLICES, program // SLICES % H, program // (SLICES * H)
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    _, index, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    passes = ((index > 0) | HAS_INITIAL) & ((end - start > C) | HAS_FINAL)
    left = tl.minimum(end - start, C).to(tl.int32)
    d = part * BS
    base = (start * H + h) * M
    om = d + tl.arange(0, BS)

    g, s, until, written, carried = g + base, s + base, until + base, written + base, carried + base
    dg, ds = dg + base, ds + base if HAS_S else ds

    parts = tl.arange(0, triton.next_power_of_2(PARTS))
    products = tl.load(
        passed + ((chunk * H + h).to(tl.int64) * PARTS + parts[:, None]) * M + om[None, :],
        mask=(parts < PARTS)[:, None] & (om < tl.where(passes, M, 0))[None, :],
        other=0.0,
    )
    through = tl.zeros([BS], tl.float32)
    for i in tl.static_range(BLOCKS):
        last = tl.minimum(left, (i + 1) * BT) - 1
        there = om < tl.where(left > i * BT, M, 0)
        through += tl.load(until + last * (H * M) + om, mask=there, other=0.0).to(tl.float32)
    earlier = tl.zeros([BS], tl.float32)  # of the block before, what it leaves in the state behind the chunk
    if BLOCKS > 1:
        write = load_write(g, s, left, d, BT, H, M, BS, HAS_S)
        behind = load_rows(carried, left, d, BT, H * M, M, BS).to(tl.float32)
        earlier = tl.sum(write * behind, axis=0)
    passing = tl.sum(products, axis=0) * tl.exp(through)

    for i in range(BLOCKS):  # the last block first: what its tokens read is owed by those before, too
        at = (BLOCKS - 1 - i) * BT
        here = left - at
        row = at * (H * M)
        given = load_rows(g + row, here, d, BT, H * M, M, BS)
        strength = given
        if HAS_S:
            strength = load_rows(s + row, here, d, BT, H * M, M, BS)
        behind = load_rows(carried + row, here, d, BT, H * M, M, BS).to(tl.float32)
        inside = load_rows(written + row, here, d, BT, H * M, M, BS)
        onward = load_rows(dg + row, here, d, BT, H * M, M, BS)
        if HAS_S:
            write = strength.to(tl.float32)
        else:
            write = one_minus_exp(given.to(tl.float32))
        onward -= write * inside
        total = sums_before_and_from(write * behind, onward, BT, DOT) + (passing + earlier)[None, :]
        passing += tl.sum(onward, axis=0)
        earlier = tl.zeros([BS], tl.float32)
        if HAS_S:
            store_rows(ds + row, inside + behind, here, d, BT, H * M, M, BS)
        else:
            total -= tl.exp(given.to(tl.float32)) * (inside + behind)
        store_rows(dg + row, total, here, d, BT, H * M, M, BS)


@triton.jit
def _of_inputs(
    y, x, h, dh, slots, slots_behind, read, weights, g, s, until, scaled, dy, dx, written_sum, carried_sum, writing,
    row, levels, left, before, factor,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, QUERIES: tl.constexpr,
    FIRST: tl.constexpr, ANY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `inputs_backward` does once it knows the block; ANY: with levels above 0 in it or in the one before.

    Otherwise what several query heads write is summed before gates meet it. Tiles of gates and weights are loaded
    together before the first of them is used, and those needed again are kept: between uses there are barriers, which
    no load passes, so that each would be waited for.
    """
    after = left - BT
    lay_out_by_16(scaled, left, BT, BM)
    own = load_rows(scaled, left, 0, BT, H * M, M, BM)
    ahead = own.to(DOT)
    if QUERIES and C > BT:
        ahead = load_rows(scaled - BT * (H * M), before, 0, BT, H * M, M, BM).to(DOT)
    if R == 1:
        reading = load_rows(read, left, 0, BT, H * M, M, BM)
        reading_after = reading
        if C > BT:
            reading_after = load_rows(read + BT * H * M, after, 0, BT, H * M, M, BM)
    written = tl.zeros([BT, BM], tl.float32)
    behind = tl.zeros([BT, BM], tl.float32)
    carried = tl.zeros([BT, BM], tl.float32)
    scores = tl.zeros([BT, BT], tl.float32)
    scores_after = tl.zeros([BT, BT], tl.float32)
    if R == 1:
        near, near_after, near_before, of_state = _weights(
            reading, reading_after, weights, own, ahead, g, s, until, levels, left, before,
            H, R, M, C, BT, BM, RANGE, HAS_S, QUERIES, ANY, DOT, PRECISION,
        )  # fmt: skip
    # Of a chunk's two blocks the first meets y of the second, the second, for dy, x of the first: one tile for both.
    ONE_TILE: tl.constexpr = QUERIES and C > BT and R == 1
    beside, beside_left = y + BT * H * R * D, after
    if ONE_TILE:
        if before > 0:
            beside, beside_left = x - BT * H * D, before
    for d in range(0, D, BD):
        xd = load_rows(x, left, d, BT, H * D, D, BD)
        dhd = load_rows(dh, slots_behind, d, BM, D, D, BD).to(DOT)
        carried = mm(xd.to(DOT), tl.trans(dhd), carried, PRECISION=PRECISION)
        out = tl.zeros([BT, BD], tl.float32)
        for r in range(R):
            if R > 1:
                reading = load_rows(read + r * M, left, 0, BT, H * R * M, M, BM)
                reading_after = reading
                if C > BT:
                    reading_after = load_rows(read + r * M + BT * H * R * M, after, 0, BT, H * R * M, M, BM)
                near, near_after, near_before, of_state = _weights(
                    reading, reading_after, weights + r * M, own, ahead, g, s, until, levels, left, before,
                    H, R, M, C, BT, BM, RANGE, HAS_S, QUERIES, ANY, DOT, PRECISION,
                )  # fmt: skip
                scores = tl.zeros([BT, BT], tl.float32)
                scores_after = tl.zeros([BT, BT], tl.float32)
            yd = load_rows(y + r * D, left, d, BT, H * R * D, D, BD)
            scores = mm(yd, tl.trans(xd), scores, PRECISION=PRECISION)
            zd = yd
            if C > BT:
                zd = load_rows(beside + r * D, beside_left, d, BT, H * R * D, D, BD)
            # Here or after the rest, whichever leaves the compiler less to spill.
            if QUERIES and R == 1:
                hd = load_rows(h, slots, d, BM, D, D, BD).to(DOT)
                grad = mm(of_state, hd, PRECISION=PRECISION)
                grad = mm(near, xd.to(DOT), grad, PRECISION=PRECISION)
                if C > BT:
                    grad = mm(near_before, zd.to(DOT), grad, PRECISION=PRECISION)
                store_rows(dy + row * D, grad * factor, left, d, BT, H * D, D, BD)
            out = mm(tl.trans(near), yd.to(DOT), out, PRECISION=PRECISION)
            if C > BT:
                scores_after = mm(zd, tl.trans(xd), scores_after, PRECISION=PRECISION)
                out = mm(near_after, zd.to(DOT), out, PRECISION=PRECISION)
            if R > 1:
                written, behind = _write(
                    written, behind, scores * factor, scores_after * factor, reading, reading_after, weights + r * M,
                    until, levels, left, H, R, M, C, BT, BM, RANGE, ANY, DOT, PRECISION,
                )  # fmt: skip
            if QUERIES and R > 1:
                hd = load_rows(h, slots, d, BM, D, D, BD).to(DOT)
                grad = mm(of_state, hd, PRECISION=PRECISION)
                grad = mm(near, xd.to(DOT), grad, PRECISION=PRECISION)
                if C > BT:
                    wd = load_rows(x - BT * H * D, before, d, BT, H * D, D, BD)
                    grad = mm(near_before, wd.to(DOT), grad, PRECISION=PRECISION)
                store_rows(dy + (row + r) * D, grad * factor, left, d, BT, H * R * D, D, BD)
        out = mm(writing, dhd, out * factor, PRECISION=PRECISION)
        store_rows(dx, out, left, d, BT, H * D, D, BD)
    if R == 1:
        tl.debug_barrier()  # not before the loop's tiles are done with: all at once they would not fit the registers
        if QUERIES:  # not kept here: two programs need the shared memory
            reading = load_rows(read, left, 0, BT, H * M, M, BM)
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    if not FIRST:
        written_before = load_rows(written_sum, left, 0, BT, H * M, M, BM)
        carried_before = load_rows(carried_sum, left, 0, BT, H * M, M, BM).to(tl.float32)
    if R == 1:
        written, behind = _write(
            written, behind, scores * factor, scores_after * factor, reading, reading_after, weights, until,
            levels, left, H, R, M, C, BT, BM, RANGE, ANY, DOT, PRECISION,
        )  # fmt: skip
    last = load_sum(until, tl.minimum(left, BT) - 1, True, H, M, BM)
    through = last
    if C > BT:
        through += load_sum(until, left - 1, after > 0, H, M, BM)
    if ANY:
        if C > BT:
            written += exp(tl.minimum(last[None, :] - sums, 0.0)) * behind
        carried *= exp(through[None, :] - sums)
    else:  # all sums are above -RANGE: one exponential for the three
        inverse = fast_exp(-sums)
        if C > BT:
            written += behind * exp(last)[None, :]
        written *= inverse
        carried *= inverse * exp(through)[None, :]
    if not FIRST:
        written += written_before
        carried += carried_before
    store_rows(written_sum, written, left, 0, BT, H * M, M, BM)
    store_rows(carried_sum, carried, left, 0, BT, H * M, M, BM)


@triton.jit
def _weights(
    reading, reading_after, weights, own, ahead, g, s, until, levels, left, before,
    H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    RANGE: tl.constexpr, HAS_S: tl.constexpr, QUERIES: tl.constexpr, ANY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the block's tokens t read of its own j, [t, j]; what tokens t of the block after read of j, [j, t]; what the
    block's tokens read of those of the block before, [t, j]; and of the state before the chunk, [t, BM].

    reading, reading_after: `read` of the block and of that after; own, ahead: `scaled` of it and of that before.
    """
    of_state = reading.to(DOT)
    if ANY:
        weak = from_start(own.to(DOT), g, s, until, left, BT, H, M, BM, RANGE, HAS_S, DOT)
        weight = load_rows(weights, left, 0, BT, H * R * M, M, BM).to(tl.float32)
        near = near_attention_any(
            reading.to(DOT), weight, weak, g, s, until, levels, left,
            BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
        )  # fmt: skip
    else:
        near = near_attention(reading.to(DOT), own.to(DOT), BT, DOT, PRECISION)
    near_after = near
    near_before = near
    if C > BT:
        last = load_sum(until, tl.minimum(left, BT) - 1, True, H, M, BM)
        keeping = (own.to(tl.float32) * to_end(last, RANGE)[None, :]).to(own.dtype).to(DOT)
        near_after = mm(keeping, tl.trans(reading_after.to(DOT)), PRECISION=PRECISION).to(DOT)
        if QUERIES:
            early, late = passing(load_sum(until, -1, before > 0, H, M, BM), ANY, RANGE)
            of_state = (reading.to(tl.float32) * late[None, :]).to(reading.dtype).to(DOT)
            near_before = mm(of_state, tl.trans(ahead), PRECISION=PRECISION).to(DOT)
            if ANY:
                of_state = (reading.to(tl.float32) * (early * late)[None, :]).to(reading.dtype).to(DOT)
    return near, near_after, near_before, of_state


@triton.jit
def _write(
    written, behind, scores, scores_after, reading, reading_after, weights, until, levels, left,
    H: tl.constexpr, R: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    RANGE: tl.constexpr, ANY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both with what scores [BT (t), BT (j)], y_t·x_j, add to ds_j: for t in the same block, and in the one after, the
    latter without e^{G_B - G_j}; without e^{-G_j} also the former unless ANY."""
    ot = tl.arange(0, BT)
    turned = tl.trans(tl.where(ot[:, None] >= ot[None, :], scores, 0.0).to(DOT))
    if ANY:
        weight = load_rows(weights, left, 0, BT, H * R * M, M, BM).to(DOT)
        written += near_writes(
            turned, reading.to(DOT), weight, until, levels, left, BT, H, M, BM, RANGE, DOT, PRECISION
        )  # fmt: skip
    else:
        written = mm(turned, reading.to(DOT), written, PRECISION=PRECISION)
    if C > BT:
        behind = mm(tl.trans(scores_after.to(DOT)), reading_after.to(DOT), behind, PRECISION=PRECISION)
    return written, behind
