"""Sums over the tokens of a chunk, each token's share decaying until it is read; exact for any gates.

With G_t the sum of the log gates from the chunk's start to token t (inclusive), a token j ≤ t that was written into
channel m with strength w_jm counts w_jm e^{G_tm-G_jm} at token t. Taken literally e^{-G_j} overflows when gates are
strong. So the factors e^{G_t} and w_j e^{-G_j} are used for the rows t whose G_t is above -RANGE in every channel,
and the remaining rows, if there are any, are computed again from the differences G_t - G_j themselves. Which of the
two a row takes depends on tokens up to t only, and neither looks further, so a result does not change by a bit when
later tokens do.

The channels are the slots of gated slot attention, or the key dimension of gated linear attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# e^60 is about 1e26: products with q·k and sums over a chunk stay far inside float32 (3e38).
RANGE = 60.0
# e^g is exactly 0 in float64 from -746 down; a floor here keeps sums of huge gates finite and changes no bit.
FLOOR = -1e4


class DecayedSums:
    """The sums of all chunks for log gates g and write strengths w, both [n, H, C, M].

    Queries come as [n, H, R, C, ·], R being the query heads of a key/value head.
    """

    def __init__(self, g: Tensor, w: Tensor):
        g = g.clamp(min=FLOOR)
        until = g.cumsum(dim=2)  # G_t
        self.w = w
        self.arriving = (w * _sum_after(g).exp()).transpose(2, 3)  # w_j e^{G_C-G_j} [n, H, M, C]
        self.decay = until[:, :, -1].exp()  # [n, H, M]
        self.grown = until.exp()[:, :, None]  # [n, H, 1, C, M]
        self.shrunk = w * until.neg().clamp(max=RANGE).exp()  # w_j e^{-G_j}; no row that is kept reads a clamped one
        self.later = torch.ones(g.shape[2], g.shape[2], dtype=torch.bool, device=g.device).triu(1)
        self.direct = (until < -RANGE).any(dim=-1)  # [n, H, C]: rows to be computed from differences
        # Tensors without memory, of which only shapes are wanted, have no gates to look at.
        self.some_direct = not g.is_meta and bool(self.direct.any())
        if self.some_direct:
            self.chunks = self.direct.any(dim=-1).any(dim=-1).nonzero()[:, 0]
            self.differences = _Differences(g[self.chunks], w[self.chunks])

    def states(self, x: Tensor, initial: Tensor, waves: list[int]) -> tuple[Tensor, Tensor]:
        """S₁ = e^{G_C} ∘ S₀ + Σ_j (w_j e^{G_C-G_j}) ⊗ x_j from chunk to chunk, for x [n, H, C, D].

        Returns the states before each chunk [n, H, M, D] and after the last of each sequence [N, H, M, D].
        """
        return _Scan.apply(self.decay, self.arriving @ x, initial, waves)

    def scores(self, q: Tensor, k: Tensor, before: Tensor) -> Tensor:
        """ℓ_t = e^{G_t} ∘ (q_t S₀ᵀ) + Σ_{j≤t} (q_t·k_j) w_j e^{G_t-G_j}.

        q [n, H, R, C, K], k [n, H, C, K], the states `before` S₀ [n, H, M, K] → [n, H, R, C, M].
        """
        R, C = q.shape[2:4]
        near = (q.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, (R, C)).masked_fill(self.later, 0.0)
        old = (q.flatten(2, 3) @ before.transpose(2, 3)).unflatten(2, (R, C))
        logits = self.grown * (old + (near.flatten(2, 3) @ self.shrunk).unflatten(2, (R, C)))
        if self.some_direct:
            again = self.grown[self.chunks] * old[self.chunks] + self.differences.scores(near[self.chunks])
            logits = self._replace_rows(logits, again)
        return logits

    def read(self, p: Tensor, v: Tensor, before: Tensor) -> Tensor:
        """o_t = (p_t ∘ e^{G_t}) S₀ + Σ_{j≤t} a_tj v_j with a_tj = Σ_m p_tm w_jm e^{G_tm-G_jm}.

        p [n, H, R, C, M], v [n, H, C, V], the states `before` S₀ [n, H, M, V] → [n, H, R, C, V].
        """
        R, C = p.shape[2:4]
        now = p * self.grown
        a = (now.flatten(2, 3) @ self.shrunk.transpose(2, 3)).unflatten(2, (R, C)).masked_fill(self.later, 0.0)
        if self.some_direct:
            a = self._replace_rows(a, self.differences.attention(p[self.chunks]))
        return (now.flatten(2, 3) @ before + a.flatten(2, 3) @ v).unflatten(2, (R, C))

    def _replace_rows(self, x: Tensor, again: Tensor) -> Tensor:
        """x [n, H, R, C, D] with the direct rows taken from `again` (its chunks only)."""
        rows = self.direct[self.chunks][:, :, None, :, None]
        return x.index_copy(0, self.chunks, torch.where(rows, again, x[self.chunks]))


class _Differences:
    """Σ with the weights w_j e^{G_t-G_j}, exact for any gates: nothing larger than w_j is ever formed.

    Rows are taken in blocks that begin at some b. For columns before b the exponent is split there,
    G_t - G_j = (G_t - G_{b-1}) + (G_{b-1} - G_j), both parts ≤ 0, and the weight is a product of two factors; inside
    the block weights are formed one by one, [BLOCK, BLOCK, M] numbers. Every exponent is summed from the gates between
    its ends, so no large numbers cancel. Blocks are checkpointed: the backward forms their weights again.

    How many chunks there are depends on later tokens' gates, and the order in which a matrix product of a library adds
    up may depend on how many it does at once. So sums are plain sums here, in an order of their own.
    """

    BLOCK = 8

    def __init__(self, g: Tensor, w: Tensor):
        self.g, self.w = g, w

    def scores(self, near: Tensor) -> Tensor:
        """Σ_j near_tj w_j e^{G_t-G_j}: [n, H, R, C, C] → [n, H, R, C, M]."""

        def block(x, inner, row, column):
            inside = (x[..., -inner.shape[3] :, None] * inner[:, :, None]).sum(-2)
            earlier = x[..., : column.shape[2], None] * column[:, :, None, None]
            return inside + row[:, :, None] * earlier.sum(-2)

        return torch.cat(self._by_blocks(lambda a, b: near[..., a:b, :b], block), dim=3)

    def attention(self, p: Tensor) -> Tensor:
        """a_tj = Σ_m p_tm w_jm e^{G_tm-G_jm}: [n, H, R, C, M] → [n, H, R, C, C]."""
        C = self.g.shape[2]

        def block(x, inner, row, column):
            inside = (x[..., None, :] * inner[:, :, None]).sum(-1)
            earlier = ((x * row[:, :, None])[..., None, :] * column[:, :, None, None]).sum(-1)
            return F.pad(torch.cat([earlier, inside], dim=-1), (0, C - earlier.shape[-1] - inside.shape[-1]))

        return torch.cat(self._by_blocks(lambda a, b: p[..., a:b, :], block), dim=3)

    def _by_blocks(self, rows, block) -> list[Tensor]:
        def weighted(x, g, w, size):
            return block(x, *self._weights(g, w, size))

        C = self.g.shape[2]
        bounds = [(a, min(a + self.BLOCK, C)) for a in range(0, C, self.BLOCK)]
        return [
            checkpoint(weighted, rows(a, b), self.g[:, :, :b], self.w[:, :, :b], b - a, use_reentrant=False)
            for a, b in bounds
        ]

    @staticmethod
    def _weights(g: Tensor, w: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the block of the last `size` tokens: weights inside it [n, H, size, size, M], and the two factors for
        earlier columns: of its rows [n, H, size, M], and of the columns before it [n, H, ·, M]."""
        before, here = g[:, :, :-size], g[:, :, -size:]
        t = torch.arange(size, device=g.device)
        later = (t[:, None] > t[None, :])[..., None]  # gate t counts for the columns before it
        sums = torch.where(later, here[:, :, :, None], 0.0).cumsum(dim=2)
        seen = (t[:, None] >= t[None, :])[..., None]
        inner = torch.where(seen, sums.exp() * w[:, :, None, -size:], 0.0)
        return inner, here.cumsum(dim=2).exp(), w[:, :, :-size] * _sum_after(before).exp()


def _sum_after(g: Tensor) -> Tensor:
    """Σ_{i>j} g_i along dimension 2, summed from the end: a difference would lose small gates behind a huge one."""
    return F.pad(g, (0, 0, 0, 1))[:, :, 1:].flip(2).cumsum(2).flip(2)


class _Scan(torch.autograd.Function):
    """S ← d ∘ S + U over the chunks of every sequence: the states before each chunk, and after the last.

    decay d [n, H, M], update U [n, H, M, D], initial [N, H, M, D], waves: how many sequences have an i-th
    chunk. A function of its own because autograd over the loop would keep every state twice.
    """

    @staticmethod
    def forward(ctx, decay, update, initial, waves):
        before = torch.empty_like(update)
        state = initial.clone()
        start = 0
        for wave in waves:
            end = start + wave
            before[start:end] = state[:wave]
            torch.addcmul(update[start:end], decay[start:end, :, :, None], before[start:end], out=state[:wave])
            start = end
        ctx.save_for_backward(decay, before)
        ctx.waves = waves
        return before, state

    @staticmethod
    def backward(ctx, grad_before, grad_final):
        decay, before = ctx.saved_tensors
        grad_update, grad_initial = _ScanBackward.apply(decay, grad_before, grad_final, ctx.waves)
        return (grad_update * before).sum(dim=-1), grad_update, grad_initial, None


class _ScanBackward(torch.autograd.Function):
    """The gradient of `_Scan`, the same scan backwards in time: R ← d ∘ R + B from the last chunk to the first.

    B [n, H, M, D] is the gradient of the states before the chunks, R begins with that of the states after the last
    [N, H, M, D]. Gives R before every chunk, which is the gradient of its update, and at the end. Linear in B and R, so
    that its own gradient is a scan forwards.
    """

    @staticmethod
    def forward(ctx, decay, grad_before, grad_final, waves):
        grad_update = torch.empty_like(grad_before)
        grad = grad_final.clone()
        end = grad_before.shape[0]
        for wave in reversed(waves):
            start = end - wave
            grad_update[start:end] = grad[:wave]
            torch.addcmul(grad_before[start:end], decay[start:end, :, :, None], grad_update[start:end], out=grad[:wave])
            end = start
        ctx.save_for_backward(decay, grad_update)
        ctx.waves = waves
        return grad_update, grad

    @staticmethod
    def backward(ctx, wanted_update, wanted_initial):
        decay, grad_update = ctx.saved_tensors
        of_before, of_final = _Scan.apply(decay, wanted_update, wanted_initial, ctx.waves)
        return (grad_update * of_before).sum(dim=-1), of_before, of_final, None
