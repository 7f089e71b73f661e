"""The Triton backend: when it can run, and its entry points."""

from functools import partial

import torch

from ..registry import Backend, Problem

try:
    import triton

    from .library import attention, context_attention, linear_attention
    from .step import triton_step
    from .step_linear import triton_linear_step
except ModuleNotFoundError as error:  # torch's CPU build brings no Triton
    if error.name != "triton":
        raise
    triton = triton_step = triton_linear_step = None  # type: ignore[assignment]

MAX_HEAD, MAX_SLOTS = 512, 256
# Kernels are made for the interpreter or for a device when they are imported.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run `problem`, or None."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if problem.device != "cuda" and not INTERPRETED:
        return f"its kernels run on CUDA devices, not on {problem.device!r} (or under TRITON_INTERPRET=1)"
    if problem.dtype == torch.float64:
        return "it has no float64"
    if problem.linear and problem.K > MAX_SLOTS:
        return f"keys wider than {MAX_SLOTS} in gated linear attention (K = {problem.K})"
    if max(problem.V, 0 if problem.linear else problem.K) > MAX_HEAD:
        return f"head dimensions above {MAX_HEAD} (K = {problem.K}, V = {problem.V})"
    if problem.M > MAX_SLOTS:
        return f"more than {MAX_SLOTS} slots (M = {problem.M})"
    return None


def triton_forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens, *, recompute=False):
    """`gated_slot_attention` by Triton kernels; arguments as there, already validated."""
    hk0, hv0 = (None, None) if initial_state is None else initial_state
    # The kernels keep both states by slots.
    hk0 = None if hk0 is None else hk0.transpose(2, 3)
    o, hkT, hvT = attention(q, k, v, g, s, hk0, hv0, cu_seqlens, float(scale), output_final_state, recompute)
    return o, (hkT.transpose(2, 3), hvT) if output_final_state else None


def triton_context_forward(q, k, v, g, s, scale, initial_state, output_final_state, recompute, exchange):
    """`triton_forward` of a stretch of sequences: see `Backend.context_forward`."""
    hk0, hv0 = (None, None) if initial_state is None else initial_state
    hk0 = None if hk0 is None else hk0.transpose(2, 3)
    o, hkT, hvT = context_attention(q, k, v, g, s, hk0, hv0, float(scale), output_final_state, recompute, exchange)
    return o, (hkT.transpose(2, 3), hvT) if output_final_state else None


def triton_linear_forward(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """`gated_linear_attention` by the kernels of the second pass; arguments as there, already validated."""
    return linear_attention(q, k, v, g, initial_state, cu_seqlens, float(scale), output_final_state)


BACKEND = Backend(
    name="triton",
    forward=triton_forward,
    unsupported=unsupported,
    priority=20,
    step=triton_step,
    linear_forward=triton_linear_forward,
    linear_step=triton_linear_step,
    traceable=True,
    forward_recomputing=partial(triton_forward, recompute=True),
    context_forward=triton_context_forward,
)
