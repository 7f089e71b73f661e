"""Context parallelism: one long sequence over several processes, each with a stretch of its tokens.

Both states follow a recurrence that is linear and diagonal, so what a stretch does to a state is known without it:

    state after = e^D ∘ state before + L,     D = Σ_t g_t,     L = Σ_t (s_t e^{Σ_{i>t} g_i}) ⊗ x_t     (x = k or v)

Each process computes D and L of its own tokens, all exchange them once, and each sums up what comes before it:

    state before r = Σ_{i<r} e^{Σ_{i<j<r} D_j} ∘ L_i

From there the operator runs as it does on one device. The backward is that of these equations: the gradient of the
state before each stretch is exchanged once, and arrives as gradients of the L and D of the stretches before it.

A process sends the two states of a head, whatever the length: (K + V + 1)·M·H float32 numbers a sequence, forward and
backward. Its own tokens are gone through once more for L, of which e^{Σ_{i>t} g_i} leaves few where gates forget.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from ..ops import gated_slot_attention
from ..ops.api import own_precision
from ..ops.registry import Problem, State, select
from ..ops.validation import check_cu_seqlens, check_policy, check_sequence, state_dtype

Group = dist.ProcessGroup | None
AT_ONCE, PIECE = 16384, 512
"""Tokens that are float32 at a time, so that no second copy of k and v exists; and tokens of one product: products of
[M, PIECE] by [PIECE, K] are many and fill a GPU, where one of [M, T] by [T, K] leaves it idle."""


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
    rank, ranks = _place(group)
    operator = partial(gated_slot_attention, scale=scale, states=states, backend=backend)
    if ranks == 1:
        return operator(
            q, k, v, g, s, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
    if q.shape[0] == 0 or q.shape[1] == 0:
        raise UsageError(f"every process needs tokens, got q {list(q.shape)} on rank {rank}")
    if initial_state is not None and rank > 0:
        raise UsageError(
            f"initial_state was given on rank {rank}: it is the state before the first token of all, which rank 0 "
            "has; give None elsewhere"
        )
    pieces = None
    if cu_seqlens is not None:
        if initial_state is not None or output_final_state:
            raise UsageError(
                "packed sequences over several processes have no initial or final states; leave out initial_state "
                "and output_final_state, or cu_seqlens"
            )
        pieces = _pieces(cu_seqlens, q.shape, rank, ranks)

    B, T, HQ, K = q.shape
    problem = Problem(B, T, HQ, k.shape[2], K, v.shape[3], g.shape[3], q.dtype, q.device.type)
    chosen = select(backend, problem)
    if chosen.context_forward is not None and pieces is None:
        exchange = Exchange(group, rank, ranks)
        with own_precision(q):
            return chosen.context_forward(
                q, k, v, g, s, scale, initial_state, output_final_state, states == "recompute", exchange
            )
    with own_precision(q):
        before = _exchange(k, v, g, s, initial_state, pieces, rank, group)
    if pieces is not None:
        return _Tied.apply(_packed(operator, (q, k, v, g, s), before, pieces), *before), None
    o, after = operator(
        q, k, v, g, s, initial_state=before if rank > 0 else initial_state, output_final_state=output_final_state
    )
    if after is not None:
        after = (_Tied.apply(after[0], *before), _Tied.apply(after[1], *before))
    return _Tied.apply(o, *before), after


class Exchange:
    """What the processes of a group tell each other of their stretches, for backends that run one themselves."""

    def __init__(self, group: Group, rank: int, ranks: int):
        self.group, self.rank, self.ranks = group, rank, ranks

    def before(self, hk: Tensor, hv: Tensor, g: Tensor) -> State | None:
        """The states before this process's tokens; None on rank 0, where what is given holds already.

        Args:
            hk, hv: [B, H, M, K], [B, H, M, V], the states after its own tokens alone, on rank 0 after those before
                them, too; float32.
            g: its log gates [B, T, H, M].
        """
        return self._states(self._all(hk, hv, g)[: self.rank], hk.shape[3])

    def behind(self, dhk: Tensor, dhv: Tensor, g: Tensor) -> State | None:
        """The gradient of the states after this process's tokens, of all that later processes have of it; None on the
        last rank.

        Args:
            dhk, dhv: [B, H, M, K], [B, H, M, V], the gradient of the states before its tokens, of its own results.
            g: as before.
        """
        return self._states(self._all(dhk, dhv, g)[self.rank + 1 :][::-1], dhk.shape[3])

    def _all(self, hk: Tensor, hv: Tensor, g: Tensor) -> list[Tensor]:
        mine = torch.cat([hk, hv, g.sum(1, dtype=hk.dtype)[..., None]], dim=-1)
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, group=self.group)
        return parts

    def _states(self, parts: list[Tensor], K: int) -> State | None:
        if not parts:
            return None
        total = _summed(parts)
        return total[..., :K].contiguous(), total[..., K:].contiguous()


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """Σ of parts [B, H, M, · + 1] without their last column, D, each times e^D of all that follow it."""
    total = parts[0][..., :-1]
    for part in parts[1:]:
        total = part[..., -1:].exp() * total + part[..., :-1]
    return total


class Pieces:
    """The packed sequences of one process's tokens.

    boundaries: of its own tokens, on the CPU. continued: whether the first of them began on a rank before, last: where
    the last of them begins; whole: whether they all belong to one sequence that began before them.
    """

    def __init__(self, boundaries: Tensor, continued: bool):
        self.boundaries, self.continued = boundaries, continued
        self.last = int(boundaries[-2])
        self.whole = continued and boundaries.numel() == 2


def _pieces(cu_seqlens: Tensor, shape: torch.Size, rank: int, ranks: int) -> Pieces:
    B, T = shape[:2]
    check_cu_seqlens(cu_seqlens, torch.Size((B, ranks * T, *shape[2:])))
    starts = cu_seqlens.cpu().long().unique()
    first, end = rank * T, (rank + 1) * T
    inside = starts[(starts > first) & (starts < end)] - first
    boundaries = torch.cat([torch.tensor([0]), inside, torch.tensor([T])])
    return Pieces(boundaries, continued=bool((starts != first).all()))


def _place(group: Group) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "context parallelism runs in the processes of torch.distributed, and no process group is initialised; "
            "start the program with torchrun and call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError("this process is not part of the group; only its processes may call")
    return rank, dist.get_world_size(group)


def _packed(operator, x: tuple[Tensor | None, ...], before: State, pieces: Pieces) -> Tensor:
    if not pieces.continued:
        return operator(*x, cu_seqlens=pieces.boundaries)[0]
    # The first piece alone has a state before it, and a state for each of thousands of pieces would be gigabytes.
    cut = int(pieces.boundaries[1])
    first, rest = (tuple(None if y is None else y[:, part] for y in x) for part in (slice(cut), slice(cut, None)))
    o = operator(*first, initial_state=before)[0]
    if pieces.boundaries.numel() == 2:
        return o
    return torch.cat([o, operator(*rest, cu_seqlens=pieces.boundaries[1:] - cut)[0]], dim=1)


def _exchange(k, v, g, s, initial: State | None, pieces: Pieces | None, rank: int, group: Group) -> State:
    """The states before this process's first token, zeros on rank 0: (hk [B, H, K, M], hv [B, H, M, V])."""
    dtype = state_dtype(k)
    g = g.to(dtype)
    strength = -torch.expm1(g) if s is None else s.to(dtype)
    decay = g.sum(1)
    weight = strength * _sums_behind(g).exp()
    if pieces is not None:
        lasts = torch.arange(g.shape[1], device=g.device) >= pieces.last
        weight = torch.where(lasts[:, None, None], weight, 0.0)
        if not pieces.whole:
            decay = torch.full_like(decay, float("-inf"))
    # L of both, and D in a column of its own: [B, H, M, K + V + 1].
    left = torch.cat([_WeightedSum.apply(weight, k), _WeightedSum.apply(weight, v)], dim=-1)
    if initial is not None:
        left = left + decay.exp()[..., None] * torch.cat([initial[0].transpose(2, 3), initial[1]], dim=-1)
    all_left = _Gather.apply(torch.cat([left, decay[..., None]], dim=-1), group)
    # Before rank 0 there is nothing, but its backward takes part in the exchange.
    state = _summed(all_left[:rank]) if rank > 0 else _Tied.apply(torch.zeros_like(left), all_left)
    hk, hv = state.split([k.shape[3], v.shape[3]], dim=-1)
    return hk.transpose(2, 3).contiguous(), hv.contiguous()


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


class _Gather(Function):
    """x of every process [ranks, ...]; backward, the sum of what all of them want of this one's."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)  # it is not ours to change
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class _Tied(Function):
    """x, whose backward does not run without that of the others: all processes take part in an exchange, also one that
    needs nothing from it."""

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(y.shape, y.dtype) for y in others]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)
