"""What any implementation with matrix units must lose: factors of products rounded to the inputs' 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm")}
"""What PyTorch makes of matrix products, einsum and linear maps; their factors come last."""


class _Rounding(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            *rest, x, y = args
            args = (*rest, x.to(self.dtype).to(x.dtype), y.to(self.dtype).to(y.dtype))
        return function(*args, **(kwargs or {}))


@contextmanager
def rounded_products(dtype: torch.dtype) -> Iterator[None]:
    """Within it every matrix product, also of a backward, takes its factors rounded to `dtype`; sums and all else stay
    what they are. Backwards run in the calling thread."""
    with torch.autograd.set_multithreading_enabled(False), _Rounding(dtype):
        yield
