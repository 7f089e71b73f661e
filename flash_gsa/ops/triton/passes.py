"""Forward and backward as sequences of launches: of gated slot attention, and of its second pass alone.

All tensors are contiguous; states lie as [·, H, M, K | V]. An absent tensor is None.
"""

import math
from functools import partial

import torch
from torch import Tensor

from . import ahead, backward, forward
from .plan import Plan, cdiv, plan_for


def forward_tensors(
    plan: Plan, q: Tensor, g: Tensor, has_initial: bool, want_final: bool, keep: bool
) -> tuple[tuple, tuple]:
    """Room for (o, hkT, hvT), and for what kernels share and the backward needs; without `want_final` or `keep`, None
    for what only they need."""
    final = plan.boundary_states(q) if want_final else (None, None)
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    p = q.new_empty(plan.B, plan.T, plan.HQ, plan.M, dtype=plan.state_dtype) if keep else None
    lse = q.new_empty(plan.B, plan.T, plan.HQ, dtype=torch.float32) if keep else None
    return (o, *final), (*plan.gate_tensors(g), p, lse, *plan.states(q, has_initial))


def forward_pass(plan: Plan, q, k, v, g, s, hk0, hv0, scale: float, want_final: bool, keep: bool):
    """((o, hkT, hvT), what the backward needs); the last two of the latter are the states between chunks."""
    given = (q, k, v, g, s, hk0, hv0, plan.cu_seqlens)
    ahead.rehearse(plan, (want_final, keep, hk0 is not None), given, partial(_rehearsal, scale, want_final, keep))
    strength = g if s is None else s
    results, shared = forward_tensors(plan, q, g, hk0 is not None, want_final, keep)
    until, scaled, *_, hk, hv = shared
    with torch.cuda.device_of(q):
        plan.prepare(g, strength, shared[:3])
        _states(plan, q, k, v, scaled, until, hk0, hv0, hk, hv, results[1:])
        _outputs(plan, q, k, v, g, strength, shared, hk0 is not None, results[0], scale)
    return results, shared


def _rehearsal(scale: float, want_final: bool, keep: bool, q, k, v, g, s, hk0, hv0, cu_seqlens) -> None:
    """A forward and, with `keep`, a backward of tensors without memory."""
    plan = plan_for(q, k, v, g, s is not None, cu_seqlens)
    (o, hkT, hvT), shared = forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, keep)
    if keep:
        backward_pass(plan, q, k, v, g, s, hk0, hv0, shared, o, hkT, hvT, scale)


def context_forward_pass(plan: Plan, q, k, v, g, s, hk0, hv0, scale: float, want_final: bool, keep: bool, exchange):
    """`forward_pass` of a stretch of sequences: results, what the backward needs, and the states before the stretch.

    exchange: from `flash_gsa.parallel.exchange`.
    """
    strength = g if s is None else s
    (o, *final), shared = forward_tensors(plan, q, g, True, True, keep)
    until, scaled, *_, hk, hv = shared
    with torch.cuda.device_of(q):
        plan.prepare(g, strength, shared[:3])
        _states(plan, q, k, v, scaled, until, hk0, hv0, hk, hv, final)
        if (before := exchange.before(*final, g)) is not None:
            hk0, hv0 = before
            _states(plan, q, k, v, scaled, until, hk0, hv0, hk, hv, final if want_final else (None, None))
        _outputs(plan, q, k, v, g, strength, shared, hk0 is not None, o, scale)
    return (o, *(final if want_final else (None, None))), shared, (hk0, hv0)


def _outputs(plan: Plan, q, k, v, g, strength, shared: tuple, has_initial: bool, o: Tensor, scale: float) -> None:
    *gates, p, lse, hk, hv = shared
    plan.launch(
        forward.outputs, plan.tiles.outputs, plan.blocks * plan.HQ,
        (q, k, v, g, strength, *gates, hk, hv, o, p, lse), (scale,), exact=True,
        HAS_INITIAL=has_initial, KEEP=p is not None,
    )  # fmt: skip


def _states(plan: Plan, q, k, v, scaled, until, hk0, hv0, hk, hv, final) -> None:
    has_initial, want_final = hk0 is not None, final[0] is not None
    plan.walk(
        forward.states_forward, plan.tiles.states, has_initial or want_final, q,
        (k, v, scaled, until, hk0, hv0, hk, hv, *final), HAS_INITIAL=has_initial, WANT_FINAL=want_final,
    )  # fmt: skip


def backward_pass(
    plan: Plan, q, k, v, g, s, hk0, hv0, shared, do, dhkT, dhvT, scale: float, last_use: bool = False, exchange=None
):
    """Gradients of q, k, v, g, s and the initial states.

    The states in `shared` may be None: computed again. last_use: `shared` may be written over. exchange: as in
    `context_forward_pass`.
    """
    strength = g if s is None else s
    *gates, p, lse, hk, hv = shared
    until, scaled, _ = gates
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    read_p = torch.empty_like(p)
    dg, ds = torch.empty_like(g, dtype=torch.float32), None if s is None else torch.empty_like(s)
    initial = plan.boundary_states(q) if hk0 is not None or exchange is not None else (None, None)
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    has_initial, has_final = hk0 is not None, dhkT is not None
    with torch.cuda.device_of(q):
        if hk is None:
            last_use = True
            hk, hv = plan.states(q, has_initial)
            _states(plan, q, k, v, scaled, until, hk0, hv0, hk, hv, (None, None))
        # Peak memory: dv is written last of all, and where Ṽ's states were, their gradients may come to lie.
        of_k, of_v = plan.state_shapes(has_final or exchange is not None)
        dhk, dl, read_dl = _within(dv, plan.state_dtype, of_k, p.shape, p.shape)
        dhv = hv if last_use and exchange is None and hv.shape == of_v else q.new_empty(of_v, dtype=plan.state_dtype)
        plan.launch(
            backward.values_backward, plan.tiles.values_backward, plan.blocks * plan.H,
            (q, v, g, strength, *gates, hv, p, lse, do, dq, dl, read_p, read_dl, dg), (1.0,), exact=True,
            HAS_INITIAL=has_initial,
        )  # fmt: skip
        of_states = hk, hv, dhk, dhv, passed, initial, has_initial
        walk = partial(_states_backward, plan, q, do, until, read_p, read_dl, *of_states, scale)
        walk(dhkT, dhvT)
        if exchange is not None and (behind := exchange.behind(*initial, g)) is not None:
            has_final = True
            walk(*(more if own is None else own + more for own, more in zip((dhkT, dhvT), behind, strict=True)))
        of_keys = (q, k, hk, dhk, read_dl, dl), (dq, dk), scale
        of_values = (do, v, hv, dhv, read_p, p), (None, dv), 1.0
        ends = {"HAS_INITIAL": has_initial, "HAS_FINAL": has_final}
        _inputs_backward(plan, (of_keys, of_values), ends, g, strength, gates, passed, dg, ds)
    return dq, dk, dv, dg.to(g.dtype), ds, *initial


def _states_backward(
    plan: Plan, q, do, until, read_p, read_dl, hk, hv, dhk, dhv, passed, initial, has_initial, scale, dhkT, dhvT
):
    has_final, want_initial = dhkT is not None, initial[0] is not None
    plan.walk(
        backward.states_backward, plan.tiles.states_backward, has_final or want_initial, q,
        (q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, *initial),
        (scale, 1.0), HAS_INITIAL=has_initial, HAS_FINAL=has_final, WANT_INITIAL=want_initial,
    )  # fmt: skip


def _within(memory: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors that lie in `memory` one after the other; those that do not fit there lie elsewhere."""
    room, begin, tensors = memory.view(-1), 0, []
    for shape in shapes:
        end = begin + math.prod(shape)
        if dtype == memory.dtype and end <= room.numel():
            tensors.append(room[begin:end].view(shape))
            begin = cdiv(end, 64) * 64  # kernels are compiled for pointers that are multiples of 16 bytes
        else:
            tensors.append(memory.new_empty(shape, dtype=dtype))
    return tensors


def _inputs_backward(plan: Plan, passes: tuple, ends: dict[str, bool], g, strength, gates, passed, dg, ds) -> None:
    """The end of a backward: for each pass a launch with (inputs, gradients of inputs, scale), then dg and ds.

    ends: HAS_INITIAL and HAS_FINAL, see `plan.states`.
    """
    # What the chunk's tokens owe cancels in part against what `values_backward` reached: 16 bits are too few there.
    written = torch.empty_like(g, dtype=torch.float32)
    carried = torch.empty_like(g, dtype=plan.state_dtype)
    for i, (inputs, gradients, scale) in enumerate(passes):
        plan.launch(
            backward.inputs_backward, plan.tiles.inputs_backward, plan.blocks * plan.H,
            (*inputs, g, strength, *gates, *gradients, written, carried), (scale,),
            D=inputs[1].shape[3], **ends, QUERIES=gradients[0] is not None, FIRST=i == 0,
        )  # fmt: skip
    plan.over_gates(
        backward.gates_backward,
        (g, strength, gates[0], passed, written, carried, dg, ds),
        PARTS=passed.shape[2],
        **ends,
    )


def linear_forward_tensors(
    plan: Plan, q: Tensor, g: Tensor, has_initial: bool, want_final: bool
) -> tuple[tuple, tuple]:
    """Room for (o, hT), and for what kernels share and the backward needs."""
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    final = plan.boundary_states(q)[1] if want_final else None
    return (o, final), (*plan.gate_tensors(g), plan.states(q, has_initial)[1])


def linear_forward_pass(plan: Plan, q, k, v, g, h0, scale: float, want_final: bool):
    """((o, hT), what the backward needs)."""
    given = (q, k, v, g, h0, plan.cu_seqlens)
    keep = any(x is not None and x.requires_grad for x in given)
    ahead.rehearse(plan, (want_final, keep, h0 is not None), given, partial(_linear_rehearsal, scale, want_final, keep))
    (o, hT), shared = linear_forward_tensors(plan, q, g, h0 is not None, want_final)
    *gates, h = shared
    until, scaled, _ = gates
    with torch.cuda.device_of(q):
        plan.prepare(g, k, gates)
        _states(plan, q, v, v, scaled, until, h0, h0, h, h, (hT, hT))
        plan.launch(
            forward.outputs, plan.tiles.outputs, plan.blocks * plan.HQ,
            (q, v, v, g, k, *gates, h, h, o, None, None), (scale,), exact=True,
            HAS_INITIAL=h0 is not None, KEEP=False,
        )  # fmt: skip
    return (o, hT), shared


def _linear_rehearsal(scale: float, want_final: bool, keep: bool, q, k, v, g, h0, cu_seqlens) -> None:
    """`_rehearsal` of gated linear attention."""
    plan = plan_for(q, k, v, g, True, cu_seqlens, linear=True)
    (o, hT), shared = linear_forward_pass(plan, q, k, v, g, h0, scale, want_final)
    if keep:
        linear_backward_pass(plan, q, k, v, g, h0, shared, o, hT, scale)


def linear_backward_pass(plan: Plan, q, k, v, g, h0, shared, do, dhT, scale: float):
    """Gradients of q, k, v, g and the initial state."""
    *gates, h = shared
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    read = torch.empty_like(q, dtype=plan.state_dtype)
    dg = torch.empty_like(g, dtype=torch.float32)
    ends = {"HAS_INITIAL": h0 is not None, "HAS_FINAL": dhT is not None}
    dh = h.new_empty(plan.state_shapes(dhT is not None)[1])
    dh0 = None if h0 is None else plan.boundary_states(q)[1]
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    with torch.cuda.device_of(q):
        plan.launch(
            backward.values_backward, plan.tiles.values_backward, plan.blocks * plan.H,
            (q, v, g, k, *gates, h, None, None, do, dq, None, read, None, dg), (scale,),
            HAS_INITIAL=h0 is not None,
        )  # fmt: skip
        plan.walk(
            backward.states_backward, plan.tiles.states_backward, any(ends.values()), q,
            (do, do, gates[0], read, read, h, h, dhT, dhT, dh, dh, passed, dh0, dh0),
            (scale, scale), **ends, WANT_INITIAL=h0 is not None,
        )  # fmt: skip
        only = (do, v, h, dh, read, q), (None, dv), scale
        _inputs_backward(plan, (only,), ends, g, k, gates, passed, dg, dk)
    return dq, dk, dv, dg.to(g.dtype), dh0
