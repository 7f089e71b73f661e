"""Weights s_j e^{G_t-G_j} one column at a time, for rows whose gates are too strong to be factored.

G_t - G_j is summed from the gates between j and t while j walks down from the chunk's end, so no large
numbers cancel. Slow (one step a column, no matrix products) and rare; exact for any gates.
"""

import triton
import triton.language as tl

from .chunks import one_minus_exp


@triton.jit
def _column(decay, g, s, token, left, j, h, om, H, M, C: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr):
    """From decay [C, BM] = G_t - G_{j+1}: that for j, and the weights s_j e^{G_t-G_j} (0 for t < j)."""
    oc = tl.arange(0, C)
    at = ((token + j) * H + h) * M + om
    gate_next = tl.load(g + at + H * M, mask=om < tl.where(j + 1 < tl.minimum(left, C), M, 0), other=0.0).to(tl.float32)
    decay = tl.where((oc > j)[:, None], decay + gate_next[None, :], 0.0)
    if HAS_S:
        write = tl.load(s + at, mask=om < tl.where(j < left, M, 0), other=0.0).to(tl.float32)
    else:
        gate = tl.load(g + at, mask=om < tl.where(j < left, M, 0), other=0.0).to(tl.float32)
        write = one_minus_exp(gate)
    weight = tl.where((oc >= j)[:, None], tl.exp(decay) * write[None, :], 0.0)
    return decay, weight


@triton.jit
def direct_logits(x, g, s, token, left, h, om, H, M, C: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr):
    """Σ_{j≤t} x_tj s_j e^{G_t-G_j}: x [C, C] → [C, BM]."""
    oc = tl.arange(0, C)
    total = tl.zeros([C, BM], tl.float32)
    decay = tl.zeros([C, BM], tl.float32)
    for back in tl.range(0, C, num_stages=1):
        j = C - 1 - back
        decay, weight = _column(decay, g, s, token, left, j, h, om, H, M, C, BM, HAS_S)
        column = tl.sum(tl.where(oc[None, :] == j, x, 0.0), axis=1)
        total += column[:, None] * weight
    return total


@triton.jit
def direct_attention(p, g, s, token, left, h, om, H, M, C: tl.constexpr, BM: tl.constexpr, HAS_S: tl.constexpr):
    """Σ_m p_tm s_jm e^{G_tm-G_jm}: p [C, BM] → [C, C], 0 for t < j."""
    oc = tl.arange(0, C)
    a = tl.zeros([C, C], tl.float32)
    decay = tl.zeros([C, BM], tl.float32)
    for back in tl.range(0, C, num_stages=1):
        j = C - 1 - back
        decay, weight = _column(decay, g, s, token, left, j, h, om, H, M, C, BM, HAS_S)
        column = tl.sum(p * weight, axis=1)
        a = tl.where(oc[None, :] == j, column[:, None], a)
    return a


@triton.jit
def direct_write_gradient(x, y, keep, g, token, left, h, om, H, M, C: tl.constexpr, BM: tl.constexpr):
    """Σ_{t≥j} x_tj y_tm e^{G_tm-G_jm} over the rows t in `keep`: x [C, C], y [C, BM] → [C, BM], indexed by j."""
    oc = tl.arange(0, C)
    total = tl.zeros([C, BM], tl.float32)
    decay = tl.zeros([C, BM], tl.float32)
    y = tl.where(keep[:, None], y, 0.0)
    for back in tl.range(0, C, num_stages=1):
        j = C - 1 - back
        at = ((token + j) * H + h) * M + om
        gate_next = tl.load(g + at + H * M, mask=om < tl.where(j + 1 < tl.minimum(left, C), M, 0), other=0.0).to(
            tl.float32
        )
        decay = tl.where((oc > j)[:, None], decay + gate_next[None, :], 0.0)
        column = tl.sum(tl.where(oc[None, :] == j, x, 0.0), axis=1)
        row = tl.sum(column[:, None] * y * tl.where((oc >= j)[:, None], tl.exp(decay), 0.0), axis=0)
        total = tl.where((oc == j)[:, None], row[None, :], total)
    return total
