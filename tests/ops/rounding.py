"""Triton's interpreter with the numbers of a GPU.

The interpreter keeps bfloat16 as uint16, the bits: `tl.dot` multiplies these as integers, and a float32 loses its low
half without being rounded. float32 operands stay whole where "tf32" was asked for. A GPU rounds float32 to the nearest
bfloat16, ties to even; multiplies the numbers and sums in float32; and tensor cores (Hopper's) do not read the low 13
bits of a float32 operand. Other arithmetic on bfloat16 stays wrong: the kernels have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it, the interpreter converts to and from bfloat16, and multiplies, as a GPU does."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def cast(self, x, to):
        of, to = x.dtype.scalar, to.scalar
        if (of, to) == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(x.data), to)
        if (of, to) == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(x.data), to)
        if tl.bfloat16 in (of, to) and of != to:  # the interpreter's own takes the bits for a number
            return cast(self, cast(self, x, tl.float32), to)
        return own_cast(self, x, to)

    def dot(self, a, b, acc, input_precision, *rest):
        tf32 = input_precision.name == "TF32"
        a, b = (TensorHandle(_operand(x.data, x.dtype.scalar == tl.bfloat16, tf32), tl.float32) for x in (a, b))
        with np.errstate(all="ignore"):
            return own_dot(self, a, b, acc, input_precision, *rest)

    own_cast, own_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    try:
        yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = own_cast, own_dot


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 as bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _operand(x: np.ndarray, is_bfloat16: bool, tf32: bool) -> np.ndarray:
    """What a product takes of x, in float32."""
    if is_bfloat16:
        return from_bfloat16(x)
    if x.dtype == np.float32 and tf32:
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return x.astype(np.float32)
