"""Forward kernels: states between chunks, then outputs of every chunk.

`states_forward` walks the chunks of a segment and writes both states between them, which is before every chunk but a
sequence's first; before that only where the sequence begins from a state. `outputs` then does pass 1, the softmax and
pass 2 of one block and query head without leaving the chip. Formulas: docs/mechanism.md. Names of sizes: C tokens a
chunk, BT a block (see chunks.py), BD one slice of K or V, M slots (padded to BM, a power of two).
"""

import triton
import triton.language as tl

from .chunks import (
    blocks_that_last,
    fast_exp,
    from_start,
    lay_out_by_16,
    load_end,
    load_levels,
    load_rows,
    load_sum,
    locate,
    mm,
    near_attention,
    near_attention_any,
    near_logits,
    near_logits_any,
    passing,
    place_before,
    products,
    store_rows,
    time_order,
    write_products,
)


@triton.jit(do_not_specialize=["T", "sequences", "segment_chunks"])
def states_forward(
    k, v, scaled, until, hk0, hv0, hk, hv, hkT, hvT, local_k, local_v, decay, cu_seqlens, segment_sequence,
    first_segment, first_chunk, T, sequences, segment_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    WANT_FINAL: tl.constexpr, LOCAL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of one state of one head through one segment, a stretch of segment_chunks chunks.

    LOCAL: what the segment alone writes, local_k, local_v [stretches, H, M, K | V], and decay [stretches, H, M], the
    sum of its gates, by the stretch of so many tokens that it begins in; of every segment but a sequence's last, and
    from the first block on that is not forgotten there.
    Otherwise hk, hv [·, H, M, K | V], both states before each chunk (`place_before`), and hkT, hvT [N, H, M, K | V]
    after the last; with SPLIT from the local states of the segments before. Grid: (segments·H·slices of K and V,).
    """
    KEY_PARTS: tl.constexpr = (K + BD - 1) // BD
    PARTS: tl.constexpr = KEY_PARTS + (V + BD - 1) // BD
    program = tl.program_id(0)
    part, h, segment = program % PARTS, program // PARTS % H, program // PARTS // H
    if PACKED:
        if segment >= tl.load(first_segment + sequences):
            return
    span = segment_chunks * C
    n, index, start, end, _ = locate(segment, cu_seqlens, segment_sequence, first_segment, T, span, PACKED)
    stretch = (start // span).to(tl.int32)
    is_last = end - start <= span
    if PACKED:
        chunk = tl.load(first_chunk + n) + index * segment_chunks
    else:
        chunk = n * tl.cdiv(T, C) + index * segment_chunks
    if LOCAL:
        if is_last:
            return

    om = tl.arange(0, BM)
    size = tl.where(part < KEY_PARTS, K, V)
    od = tl.where(part < KEY_PARTS, part, part - KEY_PARTS) * BD + tl.arange(0, BD)
    x, initial, out, final, local = k, hk0, hk, hkT, local_k
    if part >= KEY_PARTS:
        x, initial, out, final, local = v, hv0, hv, hvT, local_v
    inside = (om[:, None] < M) & (od[None, :] < size)
    at_state = om[:, None] * size + od[None, :]
    one = (M * size).to(tl.int64)
    state = tl.zeros([BM, BD], tl.float32)
    if not LOCAL:
        if HAS_INITIAL:
            state = tl.load(initial + (n * H + h) * one + at_state, mask=inside, other=0.0).to(tl.float32)
        if SPLIT:
            for i in range(index):
                before = (stretch - index + i) * H + h
                gates = tl.load(decay + before.to(tl.int64) * M + om, mask=om < M, other=0.0)
                state = state * tl.exp(gates)[:, None]
                state += tl.load(local + before * one + at_state, mask=inside, other=0.0)

    BLOCKS: tl.constexpr = C // BT
    ot = tl.arange(0, BT)
    chunks = tl.minimum(tl.cdiv(end - start, C), segment_chunks).to(tl.int32)
    rows = x + (start * H + h) * size
    weights = scaled + (start * H + h) * M
    sums = until + (start * H + h) * M
    states = out + (place_before(chunk, n, HAS_INITIAL) * H + h) * one
    gates = tl.zeros([BM], tl.float32)
    begin = 0
    turns = chunks
    if LOCAL:
        blocks = tl.minimum(tl.cdiv(end - start, BT), segment_chunks * BLOCKS).to(tl.int32)
        lasting = blocks_that_last(sums, blocks, (end - start).to(tl.int32), True, BT, H, M, BM)
        begin = (blocks - lasting) // BLOCKS
        rows += begin.to(tl.int64) * C * H * size
        weights += begin.to(tl.int64) * (C * H * M)
        sums += begin.to(tl.int64) * (C * H * M)
    else:
        # What the segment's last chunk writes counts for the final state alone.
        turns = chunks - 1
        if WANT_FINAL:
            turns = tl.where(is_last, chunks, chunks - 1)
        if HAS_INITIAL or SPLIT:
            begun = (chunks > 0) & ((index > 0) | HAS_INITIAL)
            there = inside & (od[None, :] < tl.where(begun, size, 0))
            tl.store(states + at_state, state.to(out.dtype.element_ty), mask=there)
    # Gates at the ends of a chunk's blocks are loaded a chunk ahead: unlike what products take, this is not pipelined.
    left = end - start - begin * C
    next_total = load_end(sums, left, BT, H, M, BM)
    next_total_1 = next_total
    if BLOCKS > 1:
        next_total_1 = load_end(sums + BT * H * M, left - BT, BT, H, M, BM)
    late = tl.full([BM], 1.0, tl.float32)  # what the state is still to be multiplied by
    for i in range(begin, turns):
        left = end - start - i * C
        total, total_1 = next_total, next_total_1
        next_total = load_end(sums + C * H * M, left - C, BT, H, M, BM)
        if BLOCKS > 1:
            next_total_1 = load_end(sums + (C + BT) * H * M, left - C - BT, BT, H, M, BM)
        for block in tl.static_range(BLOCKS):
            if block > 0:
                total = total_1
            here = left - block * BT
            weight = load_rows(weights + block * BT * H * M, here, 0, BT, H * M, M, BM)
            values = tl.load(
                rows + (block * BT + ot)[:, None] * (H * size) + od[None, :],
                mask=(ot < here)[:, None] & (od[None, :] < size),
                other=0.0,
            )
            early, next_late = passing(total, True, RANGE)
            state = state * (late * early)[:, None]
            state = mm(tl.trans(weight.to(DOT)), values.to(DOT), state, PRECISION=PRECISION)
            late = next_late
            gates += total.to(tl.float32)
        rows += C * H * size
        weights += C * H * M
        sums += C * H * M
        if not LOCAL:
            behind = inside
            if WANT_FINAL:
                behind = inside & (od[None, :] < tl.where(i + 1 < chunks, size, 0))
            before_next = (state * late[:, None]).to(out.dtype.element_ty)
            tl.store(states + (i + 1) * H * one + at_state, before_next, mask=behind)
    state *= late[:, None]
    if LOCAL:
        here = stretch * H + h
        tl.store(local + here * one + at_state, state, mask=inside)
        tl.store(decay + here.to(tl.int64) * M + om, gates, mask=om < tl.where(part == 0, M, 0))
    else:
        if WANT_FINAL:
            tl.store(
                final + (n * H + h) * one + at_state, state, mask=inside & (od[None, :] < tl.where(is_last, size, 0))
            )


@triton.jit(do_not_specialize=["T", "sequences"])
def outputs(
    q, k, v, g, s, until, scaled, levels, hk, hv, o, p_out, lse_out, cu_seqlens, chunk_sequence,
    first_chunk, T, sequences, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr,
    PACKED: tl.constexpr, SLICES: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP: tl.constexpr, LINEAR: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [·, HQ, V] and, for the backward, p = softmax(ℓ) [·, HQ, M] and log Σ e^ℓ [·, HQ] of one block and query head.

    LINEAR: q [·, HQ, M] takes the place of p. Grid: (chunks·C/BT·H·R,), the query heads of a group next to each other,
    so that k, v and states come from L2.
    """
    BLOCKS: tl.constexpr = C // BT
    program = tl.program_id(0)
    hq, place = program % (H * R), program // (H * R) % BLOCKS
    chunk = time_order(program // (H * R * BLOCKS), T, sequences, C, PACKED, True)
    h = hq // R
    if PACKED:
        if chunk >= tl.load(first_chunk + sequences):
            return
    n, index, start, end, _ = locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, C, PACKED)
    token, before = start + place * BT, place * BT
    if token >= end:
        return
    left = tl.minimum(end - token, C).to(tl.int32)
    row, row_q = token * H + h, token * (H * R) + hq
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
        _output_any(
            q, k + row * K, v + row * V, g, s, until, scaled, hk + state * K, hv + state * V,
            o, p_out, lse_out, row_q, place, slots, found, left, before, scale,
            H, R, K, V, M, C, BT, BD, BM, RANGE, HAS_S, KEEP, LINEAR, DOT, PRECISION,
        )  # fmt: skip
    else:
        _output(
            q, k + row * K, v + row * V, g, s, until, scaled, hk + state * K, hv + state * V,
            o, p_out, lse_out, row_q, place, slots, found, left, before, scale,
            H, R, K, V, M, C, BT, BD, BM, RANGE, HAS_S, KEEP, LINEAR, False, DOT, PRECISION,
        )  # fmt: skip


@triton.jit(noinline=True)
def _output_any(
    q, k, v, g, s, until, scaled, hk, hv, o, p_out, lse_out, row, place, slots, levels, left, before, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, KEEP: tl.constexpr,
    LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_output` with ANY: not inlined, see `backward._of_inputs_any`."""
    _output(
        q, k, v, g, s, until, scaled, hk, hv, o, p_out, lse_out, row, place, slots, levels, left, before, scale,
        H, R, K, V, M, C, BT, BD, BM, RANGE, HAS_S, KEEP, LINEAR, True, DOT, PRECISION,
    )  # fmt: skip


@triton.jit
def _output(
    q, k, v, g, s, until, scaled, hk, hv, o, p_out, lse_out, row, place, slots, levels, left, before, scale,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr, HAS_S: tl.constexpr, KEEP: tl.constexpr,
    LINEAR: tl.constexpr, ANY: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`outputs` of the query head at `row`; ANY: with levels above 0 in the block or the one before.

    Tiles of gates are loaded before the loop over slices of keys, although they are needed after it: there nothing
    would hide how long that takes.
    """
    lay_out_by_16(scaled, left, BT, BM)
    own = load_rows(scaled, left, 0, BT, H * M, M, BM).to(DOT)
    scaled_before = own
    if C > BT:
        scaled_before = load_rows(scaled - BT * (H * M), before, 0, BT, H * M, M, BM).to(DOT)
    early, late = passing(load_sum(until, -1, place > 0, H, M, BM), ANY, RANGE)
    sums = load_rows(until, left, 0, BT, H * M, M, BM)
    if LINEAR:
        p = load_rows(q + row * M, left, 0, BT, H * R * M, M, BM).to(tl.float32)
        grown = fast_exp(sums)
        factor = scale
        weak = own
        if ANY:
            weak = from_start(own, g, s, until, left, BT, H, M, BM, RANGE, HAS_S, DOT)
    else:
        scores, old = products(
            q + row * K, k, hk, slots, scaled_before, early, late, left, before, scale,
            BT, C, H * R * K, H * K, K, BD, M, BM, DOT, PRECISION,
        )  # fmt: skip
        grown = fast_exp(sums)
        weak = own
        if ANY:
            weak = from_start(own, g, s, until, left, BT, H, M, BM, RANGE, HAS_S, DOT)
            z = near_logits_any(
                scores, old, grown, weak, g, s, until, levels, left,
                BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
            )  # fmt: skip
        else:
            z = near_logits(scores, old, grown, weak, PRECISION)
        z = tl.where((tl.arange(0, BM) < M)[None, :], z, float("-inf"))
        largest = tl.max(z, axis=1)
        p = fast_exp(z - largest[:, None])
        total = tl.sum(p, axis=1)
        p *= (1.0 / total)[:, None]
        if KEEP:
            ot = tl.arange(0, BT)
            tl.store(lse_out + row + ot * (H * R), largest + tl.log(total), mask=ot < left)
            store_rows(p_out + row * M, p, left, 0, BT, H * R * M, M, BM)
        factor = 1.0
    read = p * grown
    if ANY:
        near = near_attention_any(
            read.to(DOT), p, weak, g, s, until, levels, left,
            BT, H, M, BM, RANGE, HAS_S, DOT, PRECISION,
        )  # fmt: skip
    else:
        near = near_attention(read.to(DOT), weak, BT, DOT, PRECISION)
    write_products(
        near, v, read, hv, slots, o + row * V, scaled_before, early, late, left, before, factor,
        BT, C, H * V, H * R * V, V, BD, M, BM, ANY, DOT, PRECISION,
    )  # fmt: skip
