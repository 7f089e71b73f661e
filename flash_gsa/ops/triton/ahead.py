"""What a call will launch, compiled before its first launch: all kernels at once, on all processor cores.

One after the other they would take twenty seconds where nothing is in Triton's cache. A call is rehearsed: its passes
run on tensors without memory, on which a launch compiles a kernel and runs nothing (`launching.launch`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from .plan import Plan

# The interpreter compiles nothing.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_rehearsed: set[tuple] = set()


def rehearse(plan: Plan, options: tuple[bool, ...], given: tuple[Tensor | None, ...], call: Callable[..., Any]) -> None:
    """The first time with such a plan and these options: `call` of tensors like the given ones, but without memory.

    Args:
        options: what beside the plan decides which kernels a call launches.
        given: what the call has got; where these have no memory, it is the rehearsal.
    """
    device = plan.device
    if options in plan.rehearsed or device.type == "meta" or INTERPRETED:
        return
    plan.rehearsed.add(options)
    # Other boundaries of packed sequences have another plan, with the same kernels; on the CPU they need none of
    # `tables`, and stay there.
    kinds = (None if x is None else (x.dtype, x.device) for x in given)
    key = (device, plan.tiles, plan.split, *plan.constants.values(), *options, *kinds)
    if key in _rehearsed:
        return
    _rehearsed.add(key)
    like = (x if x is None or x.device != device else x.to("meta") for x in given)
    with (
        torch.cuda.device(device),
        torch.no_grad(),
        ThreadPoolExecutor() as executor,
        triton.AsyncCompileMode(executor),
    ):
        call(*like)
