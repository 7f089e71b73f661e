"""One token of the recurrence in one pass over the slots, where both states lie in memory by slots.

A slot is a row of K̃ᵀ [M, K] and a row of Ṽ [M, V], one after the other in memory. Given both, its part of the output
is known but for the softmax's sum, as in attention over a cache of M keys and values:

    K̃ₘ = αₘ K̃ₘ + sₘ k     Ṽₘ = αₘ Ṽₘ + sₘ v     ℓₘ = scale · K̃ₘ·q     o = Σₘ exp(ℓₘ - top) Ṽₘ / Σₘ exp(ℓₘ - top)

so that one loop reads and writes the state without a stop, `top` being the largest ℓ so far; α = e^g. The slots of a
key/value head are divided among P programs; each leaves its top, its sum and its o, and whichever is the last to do so
(`arrivals.is_last`) adds them up in their order: nobody waits, and every run has the same bits.
"""

import triton
import triton.language as tl

from .arrivals import is_last
from .chunks import one_minus_exp


@triton.jit
def step_slots(
    q, k, v, g, s, hk, hv, new_hk, new_hv, o, parts, arrived,
    q_b, k_b, v_b, g_b, s_b, hk_b, hk_h, hk_m, hv_b, hv_h, hv_m, scale, H,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PER_MEETING: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, APART: tl.constexpr, TILES: tl.constexpr,
    AT_ONCE: tl.constexpr, STAGES: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    """TILES · BM slots of one group; grid (B·H·P,). x_b, x_h, … are strides.

    q [B, H·R, K], k [B, H, K], v [B, H, V], g [B, H, M], s the same or None (1 - α), hk [B, H, M, K], hv [B, H, M, V] →
    o [B, H·R, V], new_hk, new_hv, which may be hk and hv. Where P > 1, parts: float32, the o [B·H·P, R, BV] of all
    programs, then their tops and sums [B·H·P, R, 2]; arrived: a counter a group. APART: of the BM rows of a tile so
    many lie in different threads, and every APART'th in the same: those meet in the loop, without a word between
    threads, the others after it.
    """
    program = tl.program_id(0).to(tl.int64)
    group, part = program // P, (program % P).to(tl.int32)
    b, h = group // H, group % H
    g += b * g_b + h * M
    if HAS_S:
        s += b * s_b + h * M
    hk += b * hk_b + h * hk_h
    hv += b * hv_b + h * hv_h
    new_hk += b * hk_b + h * hk_h
    new_hv += b * hv_b + h * hv_h
    ok, ov = tl.arange(0, BK), tl.arange(0, BV)
    key = tl.load(k + b * k_b + h * K + ok, mask=ok < K, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_b + h * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    queries = ()
    for r in tl.static_range(R):
        query = tl.load(q + b * q_b + (h * R + r) * K + ok, mask=ok < K, other=0.0).to(tl.float32)
        queries += (query * scale,)  # type: ignore[assignment]

    # Of each row that is apart its own top, sum and o. With those of every row of a tile, 7B layer, the same tiles: 214
    # registers in float32 and 219 in bfloat16 instead of 128 and 167, 235 µs with 1,024 sequences in bfloat16 instead
    # of 209.
    tops, sums, reads = (), (), ()
    for _ in tl.static_range(R):
        tops += (tl.full((APART,), -3e38, tl.float32),)  # type: ignore[assignment]
        sums += (tl.zeros((APART,), tl.float32),)  # type: ignore[assignment]
        reads += (tl.zeros((APART, BV), tl.float32),)  # type: ignore[assignment]
    first = part * (TILES * BM)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        om = first + tile * BM + tl.arange(0, BM)
        keys = load_rows(hk, hk_m, om, ok, M, K, P * TILES * BM, BK)
        values = load_rows(hv, hv_m, om, ov, M, V, P * TILES * BM, BV)
        gate = tl.load(g + om, mask=om < M, other=0.0).to(tl.float32)
        if HAS_S:
            write = tl.load(s + om, mask=om < M, other=0.0).to(tl.float32)
        else:
            write = one_minus_exp(gate)
        if STAGES == 1 or TILES == 1:
            # The compiler moves loads down to their use, but not past a barrier: so all are on their way together.
            tl.debug_barrier()
        decay = tl.exp(gate)
        keys = keys.to(tl.float32) * decay[:, None] + key[None, :] * write[:, None]
        store_rows(keys, new_hk, hk_m, om, ok, M, K, P * TILES * BM, BK)
        values = values.to(tl.float32) * decay[:, None] + value[None, :] * write[:, None]
        store_rows(values, new_hv, hv_m, om, ov, M, V, P * TILES * BM, BV)
        values = tl.reshape(values, (BM // APART, APART, BV))
        new_tops, new_sums, new_reads = (), (), ()
        for r in tl.static_range(R):
            logits = tl.where(om < M, tl.sum(keys * queries[r][None, :], axis=1), float("-inf"))
            logits = tl.reshape(logits, (BM // APART, APART))
            top = tl.maximum(tops[r], tl.max(logits, axis=0))
            old, p = tl.exp(tops[r] - top), tl.exp(logits - top[None, :])
            new_tops += (top,)  # type: ignore[assignment]
            new_sums += (sums[r] * old + tl.sum(p, axis=0),)  # type: ignore[assignment]
            new_reads += (reads[r] * old[:, None] + tl.sum(values * p[:, :, None], axis=0),)  # type: ignore[assignment]
        tops, sums, reads = new_tops, new_sums, new_reads

    if P > 1:
        tops_of_all = parts + tl.num_programs(0).to(tl.int64) * (R * BV)
    for r in tl.static_range(R):
        top = tl.max(tops[r], axis=0)
        weight = tl.exp(tops[r] - top)
        total = tl.sum(sums[r] * weight, axis=0)
        read = tl.sum(reads[r] * weight[:, None], axis=0)
        if P == 1:
            tl.store(o + (group * R + r) * V + ov, (read / total).to(o.dtype.element_ty), mask=ov < V)
        else:
            tl.store(parts + (program * R + r) * BV + ov, read)
            tl.store(tops_of_all + (program * R + r) * 2, top)
            tl.store(tops_of_all + (program * R + r) * 2 + 1, total)
    if P > 1:
        if is_last(arrived + group, P, PER_MEETING):
            for r in tl.static_range(R):
                # Past the cache of this processor, which knows nothing of what others wrote.
                of_all = tops_of_all + ((group * P + tl.arange(0, P)) * R + r) * 2
                tops_found = tl.load(of_all, cache_modifier=".cg")
                top = tl.max(tops_found, axis=0)
                total = tl.sum(tl.load(of_all + 1, cache_modifier=".cg") * tl.exp(tops_found - top), axis=0)
                read = tl.zeros((BV,), tl.float32)
                for i in tl.static_range(0, P, AT_ONCE):
                    at = (group * P + i + tl.arange(0, AT_ONCE)) * R + r
                    share = tl.exp(tl.load(tops_of_all + at * 2, cache_modifier=".cg") - top)
                    found = tl.load(parts + at[:, None] * BV + ov[None, :], cache_modifier=".cg")
                    read += tl.sum(found * share[:, None], axis=0)
                tl.store(o + (group * R + r) * V + ov, (read / total).to(o.dtype.element_ty), mask=ov < V)


@triton.jit
def load_rows(state, stride, om, od, M: tl.constexpr, D: tl.constexpr, ALL: tl.constexpr, BD: tl.constexpr):
    """Rows `om` of ALL and columns `od` of BD, where M and D are real."""
    at = state + om[:, None] * stride + od[None, :]
    if ALL == M and BD == D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(om < M)[:, None] & (od < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, new, stride, om, od, M: tl.constexpr, D: tl.constexpr, ALL: tl.constexpr, BD: tl.constexpr):
    """The same place as in `load_rows`."""
    at = new + om[:, None] * stride + od[None, :]
    if ALL == M and BD == D:
        tl.store(at, x.to(new.dtype.element_ty))
    else:
        tl.store(at, x.to(new.dtype.element_ty), mask=(om < M)[:, None] & (od < D)[None, :])
