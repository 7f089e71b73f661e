"""Tables of packed sequences whose boundaries are on the device: which parts a sequence is cut into.

A part is a stretch of tokens that one program works on, or walks. The host must not wait for the boundaries, and the
dozen small operations that PyTorch would take for a table cost it more than a kernel of the operator does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run

# Sequences that the one program of `first_parts` counts at a time, and parts of a program of `sequences_of_parts`.
BLOCK = 1024


def parts_of(cu_seqlens: Tensor, span: int, beyond: int | None, count: int) -> tuple[Tensor, Tensor]:
    """The sequence of every part [count], and the first part of every sequence [S+1]; int32.

    Args:
        cu_seqlens: [S+1] boundaries of S ≥ 1 sequences, int32 or int64.
        span: tokens of a part. A sequence has one part at least, an empty one too.
        beyond: or else those of at most so many tokens have none.
        count: of parts, at least as many as there are; those that are too many are given the last sequence.
    """
    sequences = cu_seqlens.numel() - 1
    first = cu_seqlens.new_empty(sequences + 1, dtype=torch.int32)
    sequence = cu_seqlens.new_empty(count, dtype=torch.int32)
    with torch.cuda.device_of(cu_seqlens):
        counted = {"BEYOND": beyond is not None, "BLOCK": BLOCK}
        run(first_parts, 1, (cu_seqlens, first, sequences, span, beyond or 0), counted, stages=1)
        if count:
            programs, halvings = triton.cdiv(count, BLOCK), sequences.bit_length()
            run(sequences_of_parts, programs, (first, sequence, sequences, count, halvings), {"BLOCK": BLOCK}, stages=1)
    return sequence, first


# Compiled once for all numbers of sequences: whether one is 1 or a multiple of 16 helps none of them.
@triton.jit(do_not_specialize=["sequences", "span", "beyond"])
def first_parts(cu_seqlens, first, sequences, span, beyond, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    """first[n] = parts of the sequences before n, for n = 0 … sequences. One program."""
    tl.store(first, 0)
    before = tl.zeros([], tl.int32)
    for begin in range(0, sequences, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        there = n < sequences
        length = (tl.load(cu_seqlens + n + 1, there, 0) - tl.load(cu_seqlens + n, there, 0)).to(tl.int32)
        parts = (length + span - 1) // span
        if BEYOND:
            parts = tl.where(length > beyond, parts, 0)
        else:
            parts = tl.where(there, tl.maximum(parts, 1), 0)
        tl.store(first + 1 + n, before + tl.cumsum(parts, 0), there)
        before += tl.sum(parts, 0)


@triton.jit(do_not_specialize=["sequences", "count", "halvings"])
def sequences_of_parts(first, sequence, sequences, count, halvings, BLOCK: tl.constexpr):
    """sequence[i] = the n with first[n] ≤ i < first[n+1]: how many of first[1 … sequences] are ≤ i."""
    part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + sequences
    for _ in range(halvings):  # the answer is in low … high
        middle = (low + high) // 2
        open = low < high
        passed = tl.load(first + 1 + middle, open, 0) <= part
        low = tl.where(open & passed, middle + 1, low)
        high = tl.where(open & ~passed, middle, high)
    tl.store(sequence + part, tl.minimum(low, sequences - 1), part < count)
