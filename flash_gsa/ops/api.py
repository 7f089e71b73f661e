"""The operators' public functions: docstring, checks, choice of a backend."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from . import backends as _backends  # noqa: F401  (importing it registers them)
from .opaque import opaque_forward, opaque_linear_forward
from .reference import empty_state, reference_step
from .reference_linear import empty_linear_state, reference_linear_step
from .registry import Problem, State, select
from .validation import check_linear_sequence, check_linear_step, check_policy, check_sequence, check_step


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    states: str = "keep",
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Gated slot attention over whole sequences.

    Each key/value head keeps M slots, each with a key and a value. With α_t = e^{g_t} and write strength
    s_t (1 - α_t unless given), for every head

        K̃_t = α_t ∘ K̃_{t-1} + s_t ⊗ k_t          K̃ ∈ R^{M×K}
        Ṽ_t = α_t ∘ Ṽ_{t-1} + s_t ⊗ v_t          Ṽ ∈ R^{M×V}
        o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t)

    Query heads share the states of their group: query head i reads key/value head i // (HQ / H).

    Args:
        q: queries [B, T, HQ, K].
        k: keys [B, T, H, K]; H divides HQ.
        v: values [B, T, H, V].
        g: log forget gates [B, T, H, M], ≤ 0. Keep them in float32: bfloat16 is too coarse for gates near 0.
        s: write strengths [B, T, H, M]; None derives 1 - e^g in float32.
        scale: factor on the slot scores; 1 in GSA.
        initial_state: (hk [N, H, K, M], hv [N, H, M, V]), the states before the first token, float32
            (float64 for float64 inputs). N is B, or the number of packed sequences. None: zeros.
            (hk is K̃ transposed.)
        output_final_state: also return the states after the last token.
        cu_seqlens: [S+1] int32 or int64, boundaries of S sequences packed along T, with B = 1: first 0, last T,
            non-decreasing; equal neighbours are an empty sequence. May stay on the CPU, where
            reading it waits for no device.
        states: what the forward leaves for the backward. "keep": also the states between chunks of C tokens, up to
            (K + V)·M·H·T/C numbers in 16 bits for bfloat16 (C is 128 there with up to 64 slots and one query head a
            group). "recompute": not these; the backward computes them again, one more pass over k and v. Between the
            two that much less is kept, as many times as there are layers; the most that a single call takes stays. A
            backend without kernels of its own keeps nothing then, and computes its whole forward again.
        backend: "auto", or one of `flash_gsa.ops.backend_names()`.

    Returns:
        o [B, T, HQ, V] in q's dtype, and the final state (as initial_state) or None.
        Differentiable in q, k, v, g, s and the initial state, from o and the final state.

    Raises:
        UsageError (a ValueError): shapes, dtypes or devices that do not fit, gates above 0, a `cu_seqlens`
            that is not increasing or does not end at T, an unknown or unable backend. Values on a GPU are
            checked only under FLASH_GSA_CHECK_VALUES=1, because looking at them stalls the stream.

    Source: Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", NeurIPS 2024.
    """
    check_sequence(q, k, v, g, s, scale, initial_state, cu_seqlens)
    check_policy(states)
    B, T, HQ, K = q.shape
    problem = Problem(
        B, T, HQ, k.shape[2], K, v.shape[3], g.shape[3], q.dtype, q.device.type, packed=cu_seqlens is not None
    )
    chosen = select(backend, problem)
    if B == 0 or T == 0:
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        state = initial_state or empty_state(q, k, v, g, sequences)
        return q[..., :1].expand(B, T, HQ, v.shape[3]), (state[0], state[1]) if output_final_state else None
    forward = chosen.forward if states == "keep" else chosen.recomputing_forward
    if torch.compiler.is_compiling() and not chosen.traceable:  # it keeps nothing anyway
        forward = partial(opaque_forward, chosen.name)
    with own_precision(q):
        return forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens)


def gated_slot_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None = None,
    *,
    state: State,
    scale: float = 1.0,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """One token of `gated_slot_attention`: constant time, constant memory.

    Args:
        q: [B, HQ, K]; k: [B, H, K]; v: [B, H, V]; g: [B, H, M], ≤ 0; s: [B, H, M] or None for 1 - e^g.
        state: (hk [B, H, K, M], hv [B, H, M, V]) float32 (float64 for float64 inputs). For a new sequence give zeros.
            Both may be bfloat16, half the memory and half the traffic. Arithmetic is float32 and o is read before the
            state is rounded, but every token rounds it again: what a slot takes from a token is lost where it is less
            than half a unit in the last place (2^-9 to 2^-8) of what the slot holds: right where slots remember up to
            some hundred tokens, not beyond (measured: docs/kernels.md, decoding).
        scale: factor on the slot scores; 1 in GSA.
        in_place: update the given state's memory and return it; without gradients. False leaves it unchanged.
        backend: as in `gated_slot_attention`.

    Returns:
        o [B, HQ, V] in q's dtype, and the new state in the given one's dtype.
        Differentiable in all inputs and the state, unless `in_place`.

    Raises:
        UsageError: as in `gated_slot_attention`; `in_place` with anything that requires grad, or with a state whose
            elements share memory.
    """
    check_step(q, k, v, g, s, state, scale, in_place)
    B, HQ, K = q.shape
    problem = Problem(B, 1, HQ, k.shape[1], K, v.shape[2], g.shape[2], q.dtype, q.device.type)
    step = select(backend, problem).step or reference_step
    options = {"in_place": True} if in_place else {}
    with own_precision(q):
        return step(q, k, v, g, s, (state[0], state[1]), scale, **options)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over whole sequences: the mechanism of GLA, HGRN2 and RetNet.

    Each key/value head keeps one matrix, whose rows decay, each by its own gate. With α_t = e^{g_t}, for every head

        S_t = α_t ∘ S_{t-1} + k_t ⊗ v_t          S ∈ R^{K×V}
        o_t = scale · S_tᵀ q_t

    which is the second pass of `gated_slot_attention`: keys stand for write strengths, queries for the softmax.
    Query heads share the states of their group: query head i reads key/value head i // (HQ / H). The states between
    chunks are kept for the backward, up to K·V·H·T/C numbers (C: as there).

    Args:
        q: queries [B, T, HQ, K].
        k: keys [B, T, H, K]; H divides HQ.
        v: values [B, T, H, V].
        g: log forget gates, ≤ 0: [B, T, H, K], or [B, T, H, 1] for one gate a head. Keep them in float32: bfloat16 is
            too coarse for gates near 0.
        scale: factor on the output; the layers of this package give K^{-1/2}.
        initial_state: S [N, H, K, V] before the first token, float32 (float64 for float64 inputs). N is B, or the
            number of packed sequences. None: zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: as in `gated_slot_attention`.
        backend: "auto", or one of `flash_gsa.ops.backend_names()`; not every backend has this operator.

    Returns:
        o [B, T, HQ, V] in q's dtype, and the final state (as initial_state) or None.
        Differentiable in q, k, v, g and the initial state, from o and the final state.

    Raises:
        UsageError: as in `gated_slot_attention`.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023.
    """
    check_linear_sequence(q, k, v, g, scale, initial_state, cu_seqlens)
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    problem = Problem(B, T, HQ, H, K, V, K, q.dtype, q.device.type, packed=cu_seqlens is not None, linear=True)
    chosen = select(backend, problem)
    forward = chosen.linear_forward
    assert forward is not None
    if torch.compiler.is_compiling() and not chosen.traceable:
        forward = partial(opaque_linear_forward, chosen.name)
    if B == 0 or T == 0:
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        state = empty_linear_state(q, k, v, sequences) if initial_state is None else initial_state
        return q[..., :1].expand(B, T, HQ, V), state if output_final_state else None
    with own_precision(q):
        return forward(q, k, v, g.expand_as(k), scale, initial_state, output_final_state, cu_seqlens)


def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `gated_linear_attention`: constant time, constant memory.

    Args:
        q: [B, HQ, K]; k: [B, H, K]; v: [B, H, V]; g: [B, H, K] or [B, H, 1], ≤ 0.
        state: S [B, H, K, V] float32 (float64 for float64 inputs); never changed. For a new sequence give zeros.
        scale: factor on the output.
        backend: as in `gated_linear_attention`.

    Returns:
        o [B, HQ, V] in q's dtype, and the new state.

    Raises:
        UsageError: as in `gated_linear_attention`.
    """
    check_linear_step(q, k, v, g, state, scale)
    B, HQ, K = q.shape
    H, V = v.shape[1:]
    problem = Problem(B, 1, HQ, H, K, V, K, q.dtype, q.device.type, linear=True)
    step = select(backend, problem).linear_step or reference_linear_step
    with own_precision(q):
        return step(q, k, v, g.expand_as(k), state, scale)


def own_precision(x: Tensor) -> AbstractContextManager:
    """No autocast inside a backend: it would round the products of float32 states and gates to 16 bits."""
    device = x.device.type
    # is_autocast_available would break the graph under torch.compile of torch 2.11.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
