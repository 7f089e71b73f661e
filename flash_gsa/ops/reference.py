"""The recurrence, one token at a time: short, slow, exact. It judges every other backend.

Source: Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling" (NeurIPS 2024), §3.
"""

import itertools

import torch
from torch import Tensor

from .reference_linear import reference_linear_forward, reference_linear_step
from .registry import Backend, State
from .validation import state_dtype


def write_strength(g: Tensor) -> Tensor:
    """1 − e^g, the write strength GSA derives from its forget gate.

    As −expm1(g): near g = 0, where a damped gate lives, 1 − exp(g) would lose most of its digits.
    """
    return -torch.expm1(g)


def empty_state(q: Tensor, k: Tensor, v: Tensor, g: Tensor, sequences: int) -> State:
    """Zero states (hk [N, H, K, M], hv [N, H, M, V]) for N = `sequences`."""
    H, K, V, M = k.shape[-2], k.shape[-1], v.shape[-1], g.shape[-1]
    dtype = state_dtype(q)
    return q.new_zeros(sequences, H, K, M, dtype=dtype), q.new_zeros(sequences, H, M, V, dtype=dtype)


def reference_step(q, k, v, g, s, state: State, scale: float, in_place: bool = False) -> tuple[Tensor, State]:
    """One token of the recurrence; see `flash_gsa.gated_slot_attention_step`."""
    dtype = state_dtype(q)
    B, HQ, K = q.shape
    H = k.shape[1]
    g = g.to(dtype)
    s = write_strength(g) if s is None else s.to(dtype)
    decay = g.exp()
    hk, hv = (x.to(dtype) for x in state)
    hk = hk * decay[..., None, :] + k.to(dtype)[..., :, None] * s[..., None, :]
    hv = hv * decay[..., :, None] + s[..., :, None] * v.to(dtype)[..., None, :]
    grouped = q.to(dtype).reshape(B, H, HQ // H, K) * scale
    p = torch.softmax(grouped @ hk, dim=-1)
    o = (p @ hv).reshape(B, HQ, hv.shape[-1]).to(q.dtype)
    if in_place:
        return o, (state[0].copy_(hk), state[1].copy_(hv))
    return o, (hk.to(state[0].dtype), hv.to(state[1].dtype))


def reference_forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens):
    """The recurrence over whole sequences; packed sequences one after the other."""
    if cu_seqlens is None:
        state = initial_state or empty_state(q, k, v, g, q.shape[0])
        o, state = _run(q, k, v, g, s, scale, state)
        return o, state if output_final_state else None

    bounds = cu_seqlens.tolist()
    hk, hv = initial_state or empty_state(q, k, v, g, len(bounds) - 1)
    outputs, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        here = slice(start, end)
        part = None if s is None else s[:, here]
        state = (hk[n : n + 1], hv[n : n + 1])
        o, final = _run(q[:, here], k[:, here], v[:, here], g[:, here], part, scale, state)
        outputs.append(o)
        finals.append(final)
    hk, hv = (torch.cat(parts) for parts in zip(*finals, strict=True))
    return torch.cat(outputs, dim=1), (hk, hv) if output_final_state else None


def _run(q, k, v, g, s, scale, state):
    outputs = []
    # unbind rather than x[:, t]: the gradient of such a slice is as long as x, so that a backward would take T² time.
    tokens = zip(*(x.unbind(1) for x in (q, k, v, g)), strict=True)
    strengths = itertools.repeat(None) if s is None else s.unbind(1)
    for (qt, kt, vt, gt), st in zip(tokens, strengths, strict=False):
        o, state = reference_step(qt, kt, vt, gt, st, state, scale)
        outputs.append(o)
    if not outputs:
        return q.new_empty(*q.shape[:3], v.shape[-1]), state
    return torch.stack(outputs, dim=1), state


BACKEND = Backend(
    name="reference",
    forward=reference_forward,
    unsupported=lambda problem: None,
    priority=0,
    step=reference_step,
    linear_forward=reference_linear_forward,
    linear_step=reference_linear_step,
)
