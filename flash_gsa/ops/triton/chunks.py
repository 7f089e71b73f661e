"""What every kernel does first: find its chunk's tokens and load their gates."""

import triton
import triton.language as tl


@triton.jit
def locate(chunk, cu_seqlens, chunk_sequence, first_chunk, T, H, C: tl.constexpr, PACKED: tl.constexpr):
    """A chunk's first token (its place among all), and how many tokens from there its sequence still has."""
    if PACKED:
        n = tl.load(chunk_sequence + chunk)
        start = tl.load(cu_seqlens + n).to(tl.int64)
        end = tl.load(cu_seqlens + n + 1).to(tl.int64)
        i = chunk - tl.load(first_chunk + n)
    else:
        chunks = tl.cdiv(T, C)
        n = chunk // chunks
        i = chunk % chunks
        start = n.to(tl.int64) * T
        end = start + T
    token = start + i * C
    return token, end - token


@triton.jit
def load_gates(g, s, row, real, next_real, om, H, M, HAS_S: tl.constexpr):
    """Of one chunk [C, BM] in float32: g, s, and the gate of the next token (0 behind the chunk's last).

    Padding, of tokens and of slots, has g = 0 and s = 0: it neither forgets nor writes.
    """
    slot = om < M
    at = row[:, None] * M + om[None, :]
    gate = tl.load(g + at, mask=real[:, None] & slot[None, :], other=0.0).to(tl.float32)
    after = tl.load(g + at + H * M, mask=next_real[:, None] & slot[None, :], other=0.0).to(tl.float32)
    if HAS_S:
        write = tl.load(s + at, mask=real[:, None] & slot[None, :], other=0.0).to(tl.float32)
    else:
        write = one_minus_exp(gate)
    return gate, after, write


@triton.jit
def one_minus_exp(g):
    """1 - e^g without cancellation near 0: a series where |g| is small, the difference elsewhere."""
    series = -g * (1.0 + g * (0.5 + g * (1.0 / 6 + g * (1.0 / 24 + g * (1.0 / 120 + g * (1.0 / 720))))))
    return tl.where(g > -0.25, series, 1.0 - tl.exp(g))
