"""The passes as differentiable operations: for eager use, and as `torch.library` operators for torch.compile.

Eager calls go through autograd functions, whose overhead is smaller; under torch.compile the operators stand for
launches that it cannot look into. An operator cannot return None: an absent result is an empty tensor.
"""

import torch
from torch import Tensor

from ..once import differentiated, once_differentiable
from .passes import (
    backward_pass,
    context_forward_pass,
    forward_pass,
    forward_tensors,
    linear_backward_pass,
    linear_forward_pass,
    linear_forward_tensors,
)
from .plan import Plan, plan_for


def attention(q, k, v, g, s, hk0, hv0, cu_seqlens, scale: float, want_final: bool, recompute: bool):
    """(o, hkT, hvT): differentiable gated slot attention. hk0, hkT lie as [N, H, M, K].

    recompute: the backward computes the states between chunks again instead of keeping them.
    """
    q, k, v, g, s, hk0, hv0 = _contiguous(q, k, v, g, s, hk0, hv0)
    keep = differentiated(q, k, v, g, s, hk0, hv0)
    if not keep and not torch.compiler.is_compiling():
        plan = plan_for(q, k, v, g, s is not None, cu_seqlens)
        return forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, False)[0]
    if not torch.compiler.is_compiling():
        return _Attention.apply(q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, recompute)
    o, hkT, hvT, *_ = attention_op(q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, keep, recompute)
    return (o, hkT, hvT) if want_final else (o, None, None)


def context_attention(q, k, v, g, s, hk0, hv0, scale: float, want_final: bool, recompute: bool, exchange):
    """`attention` of a stretch of sequences, of which other processes have the others; both ways collective."""
    q, k, v, g, s, hk0, hv0 = _contiguous(q, k, v, g, s, hk0, hv0)
    if differentiated(q, k, v, g, s, hk0, hv0):
        return _ContextAttention.apply(q, k, v, g, s, hk0, hv0, scale, want_final, recompute, exchange)
    plan = plan_for(q, k, v, g, s is not None, None)
    return context_forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, False, exchange)[0]


def linear_attention(q, k, v, g, h0, cu_seqlens, scale: float, want_final: bool):
    """(o, hT): differentiable gated linear attention."""
    q, k, v, g, h0 = _contiguous(q, k, v, g, h0)
    if not torch.compiler.is_compiling():
        return _LinearAttention.apply(q, k, v, g, h0, cu_seqlens, scale, want_final)
    o, hT, *_ = linear_attention_op(q, k, v, g, h0, cu_seqlens, scale, want_final)
    return o, hT if want_final else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, recompute):
        # The backward gets the plan: tables of boundaries on the device are made once for both.
        plan = plan_for(q, k, v, g, s is not None, cu_seqlens)
        results, shared = forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, True)
        if recompute:
            shared = (*shared[:-2], None, None)
        # Of boundaries that are written over in between, autograd tells.
        ctx.save_for_backward(q, k, v, g, s, hk0, hv0, cu_seqlens, *shared)
        ctx.plan, ctx.scale = plan, scale
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhkT, dhvT):
        q, k, v, g, s, hk0, hv0, _, *shared = ctx.saved_tensors
        do, dhkT, dhvT = _contiguous(do, dhkT, dhvT)
        given = (ctx.plan, q, k, v, g, s, hk0, hv0, shared, do, dhkT, dhvT, ctx.scale)
        return *backward_pass(*given, last_use=not _graph_is_kept()), *[None] * 4


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, s, hk0, hv0, scale, want_final, recompute, exchange):
        plan = plan_for(q, k, v, g, s is not None, None)
        results, shared, before = context_forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, True, exchange)
        if recompute:
            shared = (*shared[:-2], None, None)
        ctx.save_for_backward(q, k, v, g, s, *before, *shared)
        ctx.plan, ctx.scale, ctx.exchange, ctx.has_initial = plan, scale, exchange, hk0 is not None
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhkT, dhvT):
        q, k, v, g, s, hk0, hv0, *shared = ctx.saved_tensors
        do, dhkT, dhvT = _contiguous(do, dhkT, dhvT)
        given = (ctx.plan, q, k, v, g, s, hk0, hv0, shared, do, dhkT, dhvT, ctx.scale)
        *gradients, dhk0, dhv0 = backward_pass(*given, exchange=ctx.exchange)
        return *gradients, *((dhk0, dhv0) if ctx.has_initial else (None, None)), *[None] * 4


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, h0, cu_seqlens, scale, want_final):
        plan = plan_for(q, k, v, g, True, cu_seqlens, linear=True)
        results, shared = linear_forward_pass(plan, q, k, v, g, h0, scale, want_final)
        ctx.save_for_backward(q, k, v, g, h0, cu_seqlens, *shared)
        ctx.plan, ctx.scale = plan, scale
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhT):
        q, k, v, g, h0, _, *shared = ctx.saved_tensors
        do, dhT = _contiguous(do, dhT)
        return *linear_backward_pass(ctx.plan, q, k, v, g, h0, shared, do, dhT, ctx.scale), None, None, None


def _graph_is_kept() -> bool:
    """Whether what was saved may be needed again (retain_graph=True); asked as AOTAutograd does."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _contiguous(*tensors: Tensor | None) -> tuple:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _filled(tensors, like: Tensor) -> tuple:
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _absent(x: Tensor | None) -> Tensor | None:
    return None if x is None or x.numel() == 0 else x


@torch.library.custom_op("flash_gsa::gated_slot_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    hk0: Tensor | None,
    hv0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    want_final: bool,
    keep: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, hkT, hvT, and what the backward needs."""
    plan = plan_for(q, k, v, g, s is not None, cu_seqlens)
    results, shared = forward_pass(plan, q, k, v, g, s, hk0, hv0, scale, want_final, keep)
    if recompute or not keep:
        shared = (*shared[:-2], None, None)
    return _filled((*results, *shared), q)


@attention_op.register_fake
def _(q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, keep, recompute):
    plan = Plan(q, k, v, g, s is not None, cu_seqlens)
    results, shared = forward_tensors(plan, q, g, hk0 is not None, want_final, keep)
    if recompute or not keep:
        shared = (*shared[:-2], None, None)
    return _filled((*results, *shared), q)


@torch.library.custom_op("flash_gsa::gated_slot_attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    hk0: Tensor | None,
    hv0: Tensor | None,
    cu_seqlens: Tensor | None,
    shared: list[Tensor],
    do: Tensor,
    dhkT: Tensor | None,
    dhvT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, s and the initial states."""
    do, dhkT, dhvT = _contiguous(do, dhkT, dhvT)
    kept = (*shared[:-2], *(_absent(x) for x in shared[-2:]))
    plan = plan_for(q, k, v, g, s is not None, cu_seqlens)
    return _filled(backward_pass(plan, q, k, v, g, s, hk0, hv0, kept, do, dhkT, dhvT, scale), q)


@attention_backward_op.register_fake
def _(q, k, v, g, s, hk0, hv0, cu_seqlens, shared, do, dhkT, dhvT, scale):
    initial = [None if x is None else torch.empty_like(x, dtype=torch.float32) for x in (hk0, hv0)]
    gradients = [None if x is None else torch.empty_like(x) for x in (q, k, v, g, s)]
    return _filled((*gradients, *initial), q)


def _save(ctx, inputs, output) -> None:
    q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, _, _ = inputs
    ctx.save_for_backward(q, k, v, g, s, hk0, hv0, cu_seqlens, *output[3:])
    ctx.scale, ctx.want_final = scale, want_final
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, do, dhkT, dhvT, *_):
    q, k, v, g, s, hk0, hv0, cu_seqlens, *shared = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    if ctx.want_final and (dhkT is None) != (dhvT is None):
        shape = (*(g.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,), g.shape[2], g.shape[3])
        dhkT = q.new_zeros(*shape, k.shape[3], dtype=torch.float32) if dhkT is None else dhkT
        dhvT = q.new_zeros(*shape, v.shape[3], dtype=torch.float32) if dhvT is None else dhvT
    if not ctx.want_final:
        dhkT = dhvT = None
    gradients = attention_backward_op(q, k, v, g, s, hk0, hv0, cu_seqlens, shared, do, dhkT, dhvT, ctx.scale)
    present = [x if y is not None else None for x, y in zip(gradients, (q, k, v, g, s, hk0, hv0), strict=True)]
    return *present, *[None] * 5


attention_op.register_autograd(_attention_backward, setup_context=_save)


@torch.library.custom_op("flash_gsa::gated_linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, hT, and what the backward needs."""
    plan = plan_for(q, k, v, g, True, cu_seqlens, linear=True)
    results, shared = linear_forward_pass(plan, q, k, v, g, h0, scale, want_final)
    return _filled((*results, *shared), q)


@linear_attention_op.register_fake
def _(q, k, v, g, h0, cu_seqlens, scale, want_final):
    plan = Plan(q, k, v, g, True, cu_seqlens, linear=True)
    results, shared = linear_forward_tensors(plan, q, g, h0 is not None, want_final)
    return _filled((*results, *shared), q)


@torch.library.custom_op("flash_gsa::gated_linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    shared: list[Tensor],
    do: Tensor,
    dhT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the initial state."""
    do, dhT = _contiguous(do, dhT)
    plan = plan_for(q, k, v, g, True, cu_seqlens, linear=True)
    return _filled(linear_backward_pass(plan, q, k, v, g, h0, shared, do, dhT, scale), q)


@linear_attention_backward_op.register_fake
def _(q, k, v, g, h0, cu_seqlens, shared, do, dhT, scale):
    dh0 = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)
    return _filled((*(torch.empty_like(x) for x in (q, k, v, g)), dh0), q)


def _linear_save(ctx, inputs, output) -> None:
    q, k, v, g, h0, cu_seqlens, scale, _ = inputs
    ctx.save_for_backward(q, k, v, g, h0, cu_seqlens, *output[2:])
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _linear_attention_backward(ctx, do, dhT, *_):
    q, k, v, g, h0, cu_seqlens, *shared = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    dhT = _absent(dhT)
    *gradients, dh0 = linear_attention_backward_op(q, k, v, g, h0, cu_seqlens, shared, do, dhT, ctx.scale)
    return *gradients, None if h0 is None else dh0, None, None, None


linear_attention_op.register_autograd(_linear_attention_backward, setup_context=_linear_save)
