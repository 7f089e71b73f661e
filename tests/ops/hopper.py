"""Compiles the kernels for an H100, on a machine without one: `python -m tests.ops.hopper`.

The interpreter runs kernels that the compiler would refuse. Calls are made with tensors that have no memory, which
compile and do not run (`benchmarks.hopper`). The last line printed is {module.kernel: how often compiled}.
"""

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from benchmarks.hopper import MULTIPROCESSORS, Driver
from flash_gsa.ops.triton import launching, pointwise, step, step_linear
from flash_gsa.ops.triton.abc import abc_gates
from flash_gsa.ops.triton.cross_entropy import row_losses, scaled
from flash_gsa.ops.triton.library import attention, linear_attention
from flash_gsa.ops.triton.tables import parts_of

BF16, FP32 = torch.bfloat16, torch.float32


def without_memory(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta", requires_grad=True)


def backward(*results: Tensor) -> None:
    torch.autograd.backward(results, [torch.empty_like(x) for x in results])


def sequences() -> None:
    """Slot attention and gated linear attention, forward and backward."""
    for T, HQ, H, K, V, M, dtype, boundaries in (
        (256, 2, 2, 128, 128, 64, BF16, None),
        (200, 4, 2, 40, 72, 24, FP32, torch.tensor([0, 70, 70, 200])),
    ):
        q, k, v = (without_memory(1, T, heads, size, dtype=dtype) for heads, size in ((HQ, K), (H, K), (H, V)))
        g = without_memory(1, T, H, M, dtype=FP32)
        backward(attention(q, k, v, g, None, None, None, boundaries, 1.0, False, False)[0])
        if boundaries is None:
            backward(linear_attention(q, k, v, without_memory(1, T, H, K, dtype=FP32), None, None, 1.0, False)[0])
    parts_of(torch.empty(5, dtype=torch.int32, device="meta"), 64, None, 9)


def tokens() -> None:
    """A decoding step, of states that lie by slots and of others; of few heads, too, which several programs share."""
    for B, dtype in ((1, FP32), (9, FP32), (64, FP32), (64, BF16)):
        q, k, v, g = (without_memory(B, 4, size).detach() for size in (128, 128, 128, 64))
        hk, hv = (without_memory(B, 4, 64, 128, dtype=dtype).detach() for _ in "kv")
        for state in ((hk.transpose(2, 3), hv), (hk.view(B, 4, 128, 64), hv)):
            step.launch(q, k, v, g.float(), None, state, state, 1.0)
    for B, heads, K, V, gates in (
        (1, 8, 128, 128, 128),
        (64, 4, 256, 512, 256),
        (64, 8, 100, 36, 100),
        (2, 4, 80, 130, 1),
    ):
        q, k, v = (without_memory(B, n, size).detach() for n, size in ((heads, K), (4, K), (4, V)))
        g = without_memory(B, 4, gates, dtype=FP32).detach().expand(B, 4, K)
        state = without_memory(B, 4, K, V, dtype=FP32).detach()
        step_linear.launch(q, k, v, g, state, state, 1.0)
    q, k, v, g = (without_memory(9, heads, size).detach() for heads, size in ((8, 80), (4, 80), (4, 36), (4, 33)))
    hk, hv = (without_memory(9, 4, 33, size, dtype=FP32).detach() for size in (80, 36))
    step.launch(q, k, v, g.float(), None, (hk.transpose(2, 3), hv), (hk.transpose(2, 3), hv), 1.0)


def around_the_operator() -> None:
    """What a layer, a block and the loss do beside it."""
    x, y, z = (without_memory(64, 256) for _ in range(3))
    weight = without_memory(256)
    backward(*pointwise.silu_each(x, y, z))
    backward(pointwise.log_gates(x, 8.0))
    backward(pointwise.silu_norm(x, weight, 1e-5))
    backward(*pointwise.add_norm(x, y, weight, 1e-5))
    product = pointwise.swiglu_product(x, y)
    pointwise.swiglu_gradients(x, y, product, again=True, last_use=False)
    backward(*abc_gates(without_memory(1, 500, 4, 64), None, None))
    row_losses(x.detach(), torch.empty(64, dtype=torch.int64, device="meta"), -100, gradient=True)
    scaled(x.detach(), torch.empty((), device="meta"), FP32)


def full_name(kernel: Any) -> str:
    """Two modules have a kernel of the same name."""
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def main() -> None:
    driver.set_active(Driver())
    compiled: Counter[str] = Counter()
    seen, own = set(), launching.launch

    def counted(variant: launching.Variant, programs: int, arguments: tuple):
        kernel = own(variant, programs, arguments)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled[full_name(variant.kernel)] += 1
        return kernel

    launching.launch = counted
    step.processors_of = step_linear.processors_of = lambda device: MULTIPROCESSORS
    step.meeting_place = lambda groups, numbers, device: (
        torch.empty(numbers, device=device),
        torch.empty(groups, dtype=torch.int32, device=device),
    )
    sequences()
    tokens()
    around_the_operator()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
