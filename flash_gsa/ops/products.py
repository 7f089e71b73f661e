"""Matrix products in one number format whose results are wanted in another, as training in mixed precision has them.

PyTorch casts the weight before a product and its gradient after it, each in a pass over memory. Here the gradient of a
float32 weight is what the product itself writes.
"""

import functools

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's dtype where that is on, else x's own."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):  # which knows no "meta"
        return x.dtype
    return torch.get_autocast_dtype(device)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would give them to a product: outside of it as they are."""
    return tuple(x.to(product_dtype(x)) for x in tensors)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b [N, M] of a [N, K] and b [K, M] of one dtype, rounded once, to `dtype`, where the device can."""
    if a.dtype != dtype and dtype == torch.float32 and sums_in_fp32(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b; total = a b for the `first`, whatever is in it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif sums_in_fp32(a.device, a.dtype):
        # The product adds to what is there, without being rounded and without passes of its own.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@functools.cache
def sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch writes products of `dtype` as fp32 on that device, and adds them to fp32."""
    total, x = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True
