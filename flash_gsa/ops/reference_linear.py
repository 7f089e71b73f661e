"""Gated linear attention as its recurrence, one token at a time; it judges every other backend.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023), equation 3.
"""

import itertools

import torch
from torch import Tensor

from .validation import state_dtype


def empty_linear_state(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """A zero state [N, H, K, V] for N = `sequences`."""
    return q.new_zeros(sequences, k.shape[-2], k.shape[-1], v.shape[-1], dtype=state_dtype(q))


def reference_linear_step(q, k, v, g, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token of the recurrence; see `flash_gsa.gated_linear_attention_step`."""
    dtype = state.dtype
    B, HQ, K = q.shape
    H = k.shape[1]
    state = state * g.to(dtype).exp()[..., None] + k.to(dtype)[..., :, None] * v.to(dtype)[..., None, :]
    grouped = q.to(dtype).reshape(B, H, HQ // H, K) * scale
    return (grouped @ state).reshape(B, HQ, state.shape[-1]).to(q.dtype), state


def reference_linear_forward(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """The recurrence over whole sequences; packed sequences one after the other."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    state = empty_linear_state(q, k, v, sequences) if initial_state is None else initial_state
    if cu_seqlens is None:
        o, state = _run(q, k, v, g, state, scale)
        return o, state if output_final_state else None

    outputs, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        here = slice(start, end)
        o, final = _run(q[:, here], k[:, here], v[:, here], g[:, here], state[n : n + 1], scale)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals) if output_final_state else None


def _run(q, k, v, g, state, scale):
    outputs = []
    # unbind rather than x[:, t]: the gradient of such a slice is as long as x, so that a backward would take T² time.
    for qt, kt, vt, gt in zip(*(x.unbind(1) for x in (q, k, v, g)), strict=True):
        o, state = reference_linear_step(qt, kt, vt, gt, state, scale)
        outputs.append(o)
    if not outputs:
        return q.new_empty(*q.shape[:3], v.shape[-1]), state
    return torch.stack(outputs, dim=1), state
