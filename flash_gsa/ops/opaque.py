"""Any backend under torch.compile: one operator that it does not look into.

Backends in plain PyTorch branch on the values of gates, which would break the graph. As an operator they run as
they do without torch.compile; the backward runs the forward again under autograd.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .registry import named
from .validation import state_dtype

# A backend may wait for the device, which nothing in a CUDA graph can.
TAGS = (torch.Tag.cudagraph_unsafe,)


def opaque_forward(name: str, q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens):
    """`Backend.forward` of the backend `name`, as one operator."""
    hk0, hv0 = (None, None) if initial_state is None else initial_state
    o, hk, hv = _sequence(name, q, k, v, g, s, hk0, hv0, cu_seqlens, float(scale))
    return o, (hk, hv) if output_final_state else None


def opaque_linear_forward(name: str, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """`Backend.linear_forward` of the backend `name`, as one operator."""
    o, state = _linear(name, q, k, v, g, initial_state, cu_seqlens, float(scale))
    return o, state if output_final_state else None


def _run(name, q, k, v, g, s, hk0, hv0, cu_seqlens, scale) -> tuple[Tensor, Tensor, Tensor]:
    state = None if hk0 is None else (hk0, hv0)
    o, final = named(name).forward(q, k, v, g, s, scale, state, True, cu_seqlens)
    assert final is not None
    return o, *final


def _run_linear(name, q, k, v, g, h0, cu_seqlens, scale) -> tuple[Tensor, Tensor]:
    forward = named(name).linear_forward
    assert forward is not None
    o, final = forward(q, k, v, g, scale, h0, True, cu_seqlens)
    assert final is not None
    return o, final


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _own(results: Iterable[Tensor]) -> tuple:
    """Results of an operator share no memory, neither with each other nor with its inputs."""
    return tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in results)


def gradients_of(run, q: Tensor, others: list[Tensor | None], outgoing: list[Tensor | None]) -> tuple:
    """Gradients of `run(q, *others)`; an empty tensor for an absent input."""
    # An operator runs below autograd; here autograd is needed once more, in the backward too, where a backend may have
    # checkpoints; and ADInplaceOrView, without which what is written into a view is lost to autograd. PyTorch has no
    # public way to say so.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    above = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    # The forward ran without autocast, so its repetition does.
    exactly = torch.autocast(q.device.type, enabled=False)
    with above, exactly, torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (q, *others)]
        results = run(*leaves)
        pairs = [(y, dy) for y, dy in zip(results, outgoing, strict=True) if dy is not None and y.requires_grad]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs],
            [x for x in leaves if x is not None],
            [dy for _, dy in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    found = iter(gradients)
    return _own(q.new_empty(0) if x is None else next(found) for x in leaves)


def _present(gradients, inputs) -> list[Tensor | None]:
    return [dx if x is not None else None for dx, x in zip(gradients, inputs, strict=True)]


def _like(q: Tensor, *others: Tensor | None) -> tuple:
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *others))


@torch.library.custom_op("flash_gsa::any_backend", mutates_args=(), tags=TAGS)
def _sequence(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    hk0: Tensor | None,
    hv0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _own(_run(name, q, k, v, g, s, hk0, hv0, cu_seqlens, scale))


@_sequence.register_fake
def _(name, q, k, v, g, s, hk0, hv0, cu_seqlens, scale):
    N, H, dtype = _sequences(q, cu_seqlens), k.shape[2], state_dtype(q)
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(N, H, k.shape[3], g.shape[3], dtype=dtype),
        q.new_empty(N, H, g.shape[3], v.shape[3], dtype=dtype),
    )


@torch.library.custom_op("flash_gsa::any_backend_backward", mutates_args=(), tags=TAGS)
def _sequence_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None,
    hk0: Tensor | None,
    hv0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor | None,
    dhk: Tensor | None,
    dhv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def run(q, k, v, g, s, hk0, hv0):
        return _run(name, q, k, v, g, s, hk0, hv0, cu_seqlens, scale)

    return gradients_of(run, q, [k, v, g, s, hk0, hv0], [do, dhk, dhv])


@_sequence_backward.register_fake
def _(name, q, k, v, g, s, hk0, hv0, cu_seqlens, scale, do, dhk, dhv):
    return _like(q, k, v, g, s, hk0, hv0)


def _save(ctx, inputs, output) -> None:
    ctx.name, *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dhk, dhv):
    *inputs, cu_seqlens = ctx.saved_tensors
    gradients = _sequence_backward(ctx.name, *inputs, cu_seqlens, ctx.scale, do, dhk, dhv)
    return None, *_present(gradients, inputs), None, None


_sequence.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("flash_gsa::any_linear_backend", mutates_args=(), tags=TAGS)
def _linear(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _own(_run_linear(name, q, k, v, g, h0, cu_seqlens, scale))


@_linear.register_fake
def _(name, q, k, v, g, h0, cu_seqlens, scale):
    state = (_sequences(q, cu_seqlens), k.shape[2], k.shape[3], v.shape[3])
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(state, dtype=state_dtype(q))


@torch.library.custom_op("flash_gsa::any_linear_backend_backward", mutates_args=(), tags=TAGS)
def _linear_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor | None,
    dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def run(q, k, v, g, h0):
        return _run_linear(name, q, k, v, g, h0, cu_seqlens, scale)

    return gradients_of(run, q, [k, v, g, h0], [do, dh])


@_linear_backward.register_fake
def _(name, q, k, v, g, h0, cu_seqlens, scale, do, dh):
    return _like(q, k, v, g, h0)


def _linear_backward_call(ctx, do, dh):
    *inputs, cu_seqlens = ctx.saved_tensors
    gradients = _linear_backward(ctx.name, *inputs, cu_seqlens, ctx.scale, do, dh)
    return None, *_present(gradients, inputs), None, None


_linear.register_autograd(_linear_backward_call, setup_context=_save)
