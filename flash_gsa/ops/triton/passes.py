"""Forward and backward as sequences of launches: of gated slot attention, and of its second pass alone.

All tensors are contiguous; states lie as [·, H, M, K | V]. An absent tensor is None.
"""

import torch
from torch import Tensor

from . import backward, forward
from .plan import Plan


def forward_tensors(plan: Plan, q: Tensor, g: Tensor, want_final: bool, keep: bool) -> tuple[tuple, tuple]:
    """Room for (o, hkT, hvT), and for what kernels share and the backward needs; without `want_final` or `keep`, None
    for what only they need."""
    final = plan.boundary_states(q) if want_final else (None, None)
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    p = q.new_empty(plan.B, plan.T, plan.HQ, plan.M, dtype=plan.state_dtype) if keep else None
    lse = q.new_empty(plan.B, plan.T, plan.HQ, dtype=torch.float32) if keep else None
    return (o, *final), (*plan.gate_tensors(g), p, lse, *plan.states(q))


def forward_pass(q, k, v, g, s, hk0, hv0, cu_seqlens, scale: float, want_final: bool, keep: bool):
    """((o, hkT, hvT), what the backward needs); the last two of the latter are the states before every chunk."""
    plan = Plan(q, k, v, g, s is not None, cu_seqlens)
    strength = g if s is None else s
    results, shared = forward_tensors(plan, q, g, want_final, keep)
    *gates, p, lse, hk, hv = shared
    until, _, kept, _, _ = gates
    with torch.cuda.device_of(q):
        plan.prepare(g, strength, gates)
        _states(plan, q, k, v, kept, until, hk0, hv0, hk, hv, results[1:])
        plan.launch(
            forward.outputs, plan.tiles.outputs, plan.blocks * plan.HQ,
            (q, k, v, g, strength, *gates, hk, hv, results[0], p, lse), (scale,), KEEP=keep,
        )  # fmt: skip
    return results, shared


def _states(plan: Plan, q, k, v, kept, until, hk0, hv0, hk, hv, final) -> None:
    plan.walk(
        forward.states_forward, plan.tiles.states, q, (k, v, kept, until, hk0, hv0, hk, hv, *final),
        HAS_INITIAL=hk0 is not None, WANT_FINAL=final[0] is not None,
    )  # fmt: skip


def backward_pass(q, k, v, g, s, hk0, hv0, shared, do, dhkT, dhvT, cu_seqlens, scale: float, last_use: bool = False):
    """Gradients of q, k, v, g, s and the initial states.

    The states in `shared` may be None: computed again. last_use: `shared` may be written over.
    """
    plan = Plan(q, k, v, g, s is not None, cu_seqlens)
    strength = g if s is None else s
    *gates, p, lse, hk, hv = shared
    until, _, kept, _, _ = gates
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dl, read_p, read_dl = (torch.empty_like(p) for _ in range(3))
    dg = torch.empty_like(g, dtype=torch.float32)
    dwrite, ds = (None, None) if s is None else (torch.empty_like(dg), torch.empty_like(s))
    initial = plan.boundary_states(q) if hk0 is not None else (None, None)
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    with torch.cuda.device_of(q):
        if hk is None:
            last_use = True
            hk, hv = plan.states(q)
            _states(plan, q, k, v, kept, until, hk0, hv0, hk, hv, (None, None))
        plan.launch(
            backward.values_backward, plan.tiles.values_backward, plan.blocks * plan.H,
            (q, v, g, strength, *gates, hv, p, lse, do, dq, dl, read_p, read_dl, dg), (1.0,),
        )  # fmt: skip
        # Peak memory: dhk lies where dv will come to lie when it is not needed any more, dhv where hv was.
        room = dv.view(-1)[: hk.numel()]
        fits = room.dtype == hk.dtype and room.numel() == hk.numel()
        dhk = room.view_as(hk) if fits else torch.empty_like(hk)
        dhv = hv if last_use else torch.empty_like(hv)
        plan.walk(
            backward.states_backward, plan.tiles.states_backward, q,
            (q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, *initial),
            (scale, 1.0), HAS_FINAL=dhkT is not None, WANT_INITIAL=hk0 is not None,
        )  # fmt: skip
        both = (passed, g, strength, *gates)
        of_keys = (q, k, hk, dhk, read_dl, dl, *both, dq, dk, None, dwrite, dg)
        of_values = (do, v, hv, dhv, read_p, p, *both, None, dv, dwrite, ds, dg)
        _inputs_backward(plan, parts, (of_keys, of_values), (scale, 1.0))
    return dq, dk, dv, dg.to(g.dtype), ds, *initial


def _inputs_backward(plan: Plan, parts: int, passes: tuple[tuple, ...], scales: tuple[float, ...]) -> None:
    """The end of a backward: one launch for each pass, of which the last argument, dg, is completed together."""
    dg = passes[0][-1]
    sums = dg.new_empty(2, len(passes), plan.chunks.count, plan.blocks, plan.H, plan.M)
    tile, programs = plan.tiles.inputs_backward, plan.blocks * plan.H
    for i, (arguments, scale) in enumerate(zip(passes, scales, strict=True)):
        plan.launch(
            backward.inputs_backward, tile, programs, (*arguments, sums[0, i], sums[1, i]), (scale,),
            D=arguments[1].shape[3], PARTS=parts, QUERIES=i < len(passes) - 1, FIRST=i == 0,
        )  # fmt: skip
    if plan.blocks > 1:
        plan.complete(backward.across_blocks, dg, sums[0], sums[1], sums.stride(1), PASSES=len(passes))


def linear_forward_tensors(plan: Plan, q: Tensor, g: Tensor, want_final: bool) -> tuple[tuple, tuple]:
    """Room for (o, hT), and for what kernels share and the backward needs."""
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    final = plan.boundary_states(q)[1] if want_final else None
    return (o, final), (*plan.gate_tensors(g), plan.states(q)[1])


def linear_forward_pass(q, k, v, g, h0, cu_seqlens, scale: float, want_final: bool):
    """((o, hT), what the backward needs)."""
    plan = Plan(q, k, v, g, True, cu_seqlens, linear=True)
    (o, hT), shared = linear_forward_tensors(plan, q, g, want_final)
    *gates, h = shared
    until, _, kept, _, _ = gates
    with torch.cuda.device_of(q):
        plan.prepare(g, k, gates)
        _states(plan, q, v, v, kept, until, h0, h0, h, h, (hT, hT))
        plan.launch(
            forward.outputs, plan.tiles.outputs, plan.blocks * plan.HQ,
            (q, v, v, g, k, *gates, h, h, o, None, None), (scale,), KEEP=False,
        )  # fmt: skip
    return (o, hT), shared


def linear_backward_pass(q, k, v, g, h0, shared, do, dhT, cu_seqlens, scale: float):
    """Gradients of q, k, v, g and the initial state."""
    plan = Plan(q, k, v, g, True, cu_seqlens, linear=True)
    *gates, h = shared
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    read = torch.empty_like(q, dtype=plan.state_dtype)
    dg = torch.empty_like(g, dtype=torch.float32)
    dh = torch.empty_like(h)
    dh0 = None if h0 is None else plan.boundary_states(q)[1]
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    with torch.cuda.device_of(q):
        plan.launch(
            backward.values_backward, plan.tiles.values_backward, plan.blocks * plan.H,
            (q, v, g, k, *gates, h, None, None, do, dq, None, read, None, dg), (scale,),
        )  # fmt: skip
        plan.walk(
            backward.states_backward, plan.tiles.states_backward, q,
            (do, do, gates[0], read, read, h, h, dhT, dhT, dh, dh, passed, dh0, dh0),
            (scale, scale), HAS_FINAL=dhT is not None, WANT_INITIAL=h0 is not None,
        )  # fmt: skip
        only = (do, v, h, dh, read, q, passed, g, k, *gates, None, dv, None, dk, dg)
        _inputs_backward(plan, parts, (only,), (scale,))
    return dq, dk, dv, dg.to(g.dtype), dh0
