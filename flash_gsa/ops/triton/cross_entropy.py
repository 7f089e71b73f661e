"""Cross entropy of rows of logits and, in their place, its gradient.

    nll = log Σ_j e^{z_j - m} + m - z_y,     m = max_j z_j
    dnll/dz_j = e^{z_j - m} / Σ_i e^{z_i - m} - [j = y]

A program goes over its row twice: for m and the sum, which grows with m as it is found, and for the gradient. A row of
32,000 logits in 16 bits takes 64 KB and few rows are under way at once, so that the second time it comes from L2.
Arithmetic is float32 throughout. The sum is used as it is, with m taken out, and not as its logarithm: of logits near
10⁴ that would keep three digits only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import run
from .pointwise import TILE

# Logits that a program takes at once, 16 a thread: in 16 bits two loads of 16 bytes. A multiprocessor holds two or more
# such programs, so that one loads while another adds up.
WIDEST = 8192
PER_THREAD = 16


@triton.jit
def row_losses_kernel(
    logits, targets, losses, stride, V, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """nll of each row, 0 where its target is IGNORED; with GRADIENT the row becomes its gradient. Grid (rows,).

    logits [rows, stride], of which the first V of a row count; the rest of a row may hold anything, and is overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    scored = target != IGNORED
    # Before the row is overwritten. A target that is no class makes the loss NaN, which stops a run.
    is_class = (target >= 0) & (target < V)
    right = tl.load(logits + target, mask=is_class, other=float("nan")).to(tl.float32)

    # Finite from the start: e^{z - m} is a number also where all z so far are -∞.
    top, total = tl.full((), -3e38, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, tl.where(scored, V, 0), BLOCK):
        at = first + tl.arange(0, BLOCK)
        # What follows the row is loaded with it, so that the last load is no narrower than the others.
        z = tl.load(logits + at, mask=at < stride, other=0.0).to(tl.float32)
        z = tl.where(at < V, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    tl.store(losses + row, tl.where(scored, tl.log(total) + (top - right), 0.0))

    if GRADIENT:
        share = 1.0 / total
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z = tl.load(logits + at, mask=at < stride, other=0.0).to(tl.float32)
            dz = tl.exp(z - top) * share
            dz = tl.where(scored, tl.where(at == target, dz - 1.0, dz), 0.0)
            tl.store(logits + at, dz.to(logits.dtype.element_ty), mask=at < stride)


@triton.jit
def scaled_kernel(x, factor, y, size, TILE: tl.constexpr):
    """y = factor · x, rounded once; grid (tiles,)."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


def row_losses(logits: Tensor, targets: Tensor, ignored: int, gradient: bool) -> Tensor:
    """nll [rows] in float32; with `gradient`, the logits become their gradient.

    Args:
        logits: [rows, V], the first columns of a table [rows, stride] whose other columns may be overwritten. Loads are
            of 16 bytes where stride is a multiple of 16.
        targets: [rows], int64.
    """
    rows, V = logits.shape
    stride = logits.stride(0)
    assert logits.stride(1) == 1
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    block = min(WIDEST, triton.next_power_of_2(V))
    constants = {"IGNORED": ignored, "GRADIENT": gradient, "BLOCK": block}
    with torch.cuda.device_of(logits):
        arguments = (logits, targets.contiguous(), losses, stride, V)
        run(row_losses_kernel, rows, arguments, constants, max(4, block // (32 * PER_THREAD)))
    return losses


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · x in `dtype`, the factor a float32 number on x's device."""
    x, y = x.contiguous(), torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        run(scaled_kernel, triton.cdiv(x.numel(), TILE), (x, factor, y, x.numel()), {"TILE": TILE})
    return y
