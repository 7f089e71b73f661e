"""Context parallelism: one long sequence over several processes, each with a stretch of its tokens.

The states follow a recurrence that is linear and diagonal, so what a stretch does to a state is known without it:

    state after = e^D ∘ state before + L,     D = Σ_t g_t,     L = Σ_t (w_t e^{Σ_{i>t} g_i}) ⊗ x_t

with w the write strengths s and x = k or v in gated slot attention, w the keys and x = v in gated linear attention.
Each process computes D and L of its own tokens, all exchange them once, and each sums up what comes before it:

    state before r = Σ_{i<r} e^{Σ_{i<j<r} D_j} ∘ L_i

From there the operator runs as it does on one device. The backward is that of these equations: the gradient of the
state before each stretch is exchanged once, and arrives as gradients of the L and D of the stretches before it.

A process sends the states of a head, whatever the length: (K + V + 1)·M·H float32 numbers a sequence, (V + 1)·K·H in
gated linear attention, forward and backward. Its own tokens, of packed sequences those of the last one, are gone
through once more for L.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import UsageError
from ..ops import gated_linear_attention, gated_slot_attention
from ..ops.api import own_precision
from ..ops.once import once_differentiable
from ..ops.registry import Problem, State, select
from ..ops.validation import check_linear_sequence, check_policy, check_sequence, state_dtype
from .exchange import Exchange, Gather, Group, Part, Tied, part_of, place, summed

AT_ONCE, PIECE = 16384, 512
"""Tokens that are float32 at a time, so that no second copy of k and v exists; and tokens of one product: products of
[M, PIECE] by [PIECE, K] are many and fill a GPU, where one of [M, T] by [T, K] leaves it idle."""


@torch.compiler.disable
def context_parallel_gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s: Tensor | None = None,
    *,
    group: Group = None,
    scale: float = 1.0,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    states: str = "keep",
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """`gated_slot_attention` of sequences of which each process of `group` holds a stretch, in the order of its ranks.

    Every process calls it with its own tokens and gets their o, with Ṽ and K̃ of all tokens before them:

        o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t),    K̃_t = e^{Σ_{i≤t} g_i} ∘ K̃₀ + what its own tokens up to t have written,

    K̃₀ being the state before its first token (see the module). Values and gradients are those of one process with all
    tokens. Collective: all processes of the group must call it, and run its backward, in the same order.

    Args:
        q, k, v, g, s: this process's tokens, as in `gated_slot_attention`. B and all widths are the same everywhere;
            the numbers of tokens may differ, unless `cu_seqlens` is given.
        group: the processes; None: all.
        initial_state: the states before the very first token; that of rank 0 counts, elsewhere give None.
        output_final_state: also return the states after this process's last token; on the last rank those of the whole.
        cu_seqlens: boundaries [S+1] of sequences packed along the tokens of all processes together, the same
            everywhere (B = 1): 0 first, ranks · T last, where every process has T tokens. Best kept on the CPU.
            Without initial and final states.
        scale, states, backend: as in `gated_slot_attention`.

    Returns:
        o [B, T, HQ, V] of this process's tokens, and the states after them or None.

    Raises:
        UsageError: as in `gated_slot_attention`; no process group is initialised; no tokens; an initial state on
            another rank than 0; boundaries that do not end at ranks · T; packed sequences with initial or final states.

    Source: the operator as in `gated_slot_attention`; the exchange follows from its recurrence, as derived above.
    """
    check_policy(states)
    check_sequence(q, k, v, g, s, scale, None if cu_seqlens is not None else initial_state, None)
    rank, ranks = place(group)
    operator = partial(gated_slot_attention, scale=scale, states=states, backend=backend)
    if ranks == 1:
        return operator(
            q, k, v, g, s, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
    part = _checked_part(q, cu_seqlens, initial_state, output_final_state, rank, ranks)

    B, T, HQ, K = q.shape
    problem = Problem(B, T, HQ, k.shape[2], K, v.shape[3], g.shape[3], q.dtype, q.device.type)
    chosen = select(backend, problem)
    if chosen.context_forward is not None and part.boundaries is None:
        exchange = Exchange(group, rank, ranks)
        with own_precision(q):
            return chosen.context_forward(
                q, k, v, g, s, scale, initial_state, output_final_state, states == "recompute", exchange
            )
    initial = None if initial_state is None else torch.cat([initial_state[0].transpose(2, 3), initial_state[1]], -1)
    with own_precision(q):
        lasts = slice(part.last, None)
        wide = g[:, lasts].to(state_dtype(q))
        strength = -torch.expm1(wide) if s is None else s[:, lasts]
        before = _exchange(strength, (k[:, lasts], v[:, lasts]), wide, initial, part, group)

    def state(before: Tensor) -> State:
        hk, hv = before.split([K, v.shape[3]], dim=-1)
        return hk.transpose(2, 3).contiguous(), hv.contiguous()

    return _from(before, state, operator, (q, k, v, g, s), initial_state, output_final_state, part)


@torch.compiler.disable
def context_parallel_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    group: Group = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`gated_linear_attention` of sequences of which each process of `group` holds a stretch, in the order of ranks.

        o_t = scale · S_tᵀ q_t,    S_t = e^{Σ_{i≤t} g_i} ∘ S₀ + what its own tokens up to t have written,

    S₀ being the state before this process's first token. Collective, and otherwise in every way as
    `context_parallel_gated_slot_attention`.

    Args:
        q, k, v, g, scale, backend: this process's tokens, as in `gated_linear_attention`.
        group, initial_state, output_final_state, cu_seqlens: as in `context_parallel_gated_slot_attention`; the state
            is S [B, H, K, V].

    Returns:
        o [B, T, HQ, V] of this process's tokens, and the state after them or None.

    Raises:
        UsageError: as in `gated_linear_attention` and `context_parallel_gated_slot_attention`.
    """
    check_linear_sequence(q, k, v, g, scale, None if cu_seqlens is not None else initial_state, None)
    rank, ranks = place(group)
    operator = partial(gated_linear_attention, scale=scale, backend=backend)
    if ranks == 1:
        return operator(
            q, k, v, g, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
    part = _checked_part(q, cu_seqlens, initial_state, output_final_state, rank, ranks)
    with own_precision(q):
        lasts = slice(part.last, None)
        wide = g.expand_as(k)[:, lasts].to(state_dtype(q))
        before = _exchange(k[:, lasts], (v[:, lasts],), wide, initial_state, part, group)
    return _from(before, lambda x: x, operator, (q, k, v, g), initial_state, output_final_state, part)


def _checked_part(q: Tensor, cu_seqlens, initial_state, output_final_state: bool, rank: int, ranks: int) -> Part:
    if q.shape[0] == 0 or q.shape[1] == 0:
        raise UsageError(f"every process needs tokens, got q {list(q.shape)} on rank {rank}")
    if initial_state is not None and rank > 0:
        raise UsageError(
            f"initial_state was given on rank {rank}: it is the state before the first token of all, which rank 0 "
            "has; give None elsewhere"
        )
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        raise UsageError(
            "packed sequences over several processes have no initial or final states; leave out initial_state "
            "and output_final_state, or cu_seqlens"
        )
    return part_of(cu_seqlens, q.shape, rank, ranks)


def _exchange(
    w: Tensor, inputs: Sequence[Tensor], g: Tensor, initial: Tensor | None, part: Part, group: Group
) -> Tensor:
    """The state before this process's first token, zeros where that begins a sequence: [B, H, M, width of inputs].

    Args:
        w, g: [B, T, H, M] of the tokens of this process's last sequence, g in the dtype of states.
        inputs: x of the module's equations, each [B, T, H, D].
        initial: the state before the tokens of rank 0.
    """
    decay = g.sum(1)
    weight = w * _sums_behind(g).exp()
    left = torch.cat([_WeightedSum.apply(weight, x) for x in inputs], dim=-1)
    if initial is not None:
        left = left + decay.exp()[..., None] * initial
    every = Gather.apply(torch.cat([left, decay[..., None]], dim=-1), group)
    before = every[part.before]
    return summed(before) if len(before) else Tied.apply(torch.zeros_like(left), every)


def _from(
    before: Tensor,
    state: Callable[[Tensor], Any],
    operator: Callable[..., tuple[Tensor, Any]],
    x: tuple[Tensor | None, ...],
    initial_state: Any,
    output_final_state: bool,
    part: Part,
) -> tuple[Tensor, Any]:
    """The operator over this process's tokens x, from `before`, of which `state` makes what the operator takes."""
    if part.boundaries is not None:
        return Tied.apply(_packed(operator, x, state(before), part), before), None
    initial_state = state(before) if part.rank > 0 else initial_state
    o, after = operator(*x, initial_state=initial_state, output_final_state=output_final_state)
    if isinstance(after, Tensor):
        after = Tied.apply(after, before)
    elif after is not None:
        after = tuple(Tied.apply(y, before) for y in after)
    return Tied.apply(o, before), after


def _packed(operator, x: tuple[Tensor | None, ...], before, part: Part) -> Tensor:
    assert part.boundaries is not None
    if part.begun == part.rank:
        return operator(*x, cu_seqlens=part.boundaries)[0]
    # The first piece alone has a state before it, and a state for each of thousands of pieces would be gigabytes.
    cut = int(part.boundaries[1])
    first, rest = (tuple(None if y is None else y[:, some] for y in x) for some in (slice(cut), slice(cut, None)))
    o = operator(*first, initial_state=before)[0]
    if part.boundaries.numel() == 2:
        return o
    return torch.cat([o, operator(*rest, cu_seqlens=part.boundaries[1:] - cut)[0]], dim=1)


def _sums_behind(g: Tensor) -> Tensor:
    """Σ_{i>t} g_i of g [B, T, H, M]. From the end: where they are small, and count, they have all their digits.

    In pieces, because a GPU goes through the tokens of a sum one by one.
    """
    pieces = _in_pieces(g)  # [B, pieces, H, PIECE, M]
    until_end = pieces.flip(3).cumsum(3).flip(3)
    totals = until_end[:, :, :, :1]
    behind_piece = torch.cat([totals[:, 1:], torch.zeros_like(totals[:, :1])], dim=1).flip(1).cumsum(1).flip(1)
    behind = torch.cat([until_end[:, :, :, 1:], torch.zeros_like(totals)], dim=3) + behind_piece
    return behind.transpose(2, 3).flatten(1, 2)[:, : g.shape[1]]


class _WeightedSum(Function):
    """Σ_t w_t ⊗ x_t [B, H, M, D] of w [B, T, H, M] and x [B, T, H, D], in w's dtype."""

    @staticmethod
    def forward(ctx, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        total = w.new_zeros(w.shape[0], *w.shape[2:], x.shape[3])
        for here in _stretches(w.shape[1]):
            wp, xp = _in_pieces(w[:, here]), _in_pieces(x[:, here].to(w.dtype))
            total += (wp.transpose(-1, -2) @ xp).sum(1)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        w, x = ctx.saved_tensors
        dw, dx = torch.empty_like(w), torch.empty_like(x)
        for here in _stretches(w.shape[1]):
            dw[:, here] = (x[:, here].to(w.dtype).transpose(1, 2) @ grad.transpose(-1, -2)).transpose(1, 2)
            dx[:, here] = (w[:, here].transpose(1, 2) @ grad).transpose(1, 2).to(x.dtype)
        return dw, dx


def _stretches(T: int) -> list[slice]:
    return [slice(a, min(a + AT_ONCE, T)) for a in range(0, T, AT_ONCE)]


def _in_pieces(x: Tensor) -> Tensor:
    """x [B, T, H, D] as [B, pieces, H, PIECE, D], with zeros at its end."""
    B, T, H, D = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -T % PIECE))
    return x.view(B, -1, PIECE, H, D).transpose(2, 3)
