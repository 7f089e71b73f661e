"""The chunkwise form in PyTorch: matrix products inside chunks, one scan of states between them.

Per chunk of C tokens, with G_t the sum of the log gates from the chunk's start to token t (inclusive),
everything per slot, K̃₀ and Ṽ₀ the states at the chunk's start (Zhang et al., 2024, Algorithm 1 and Listing 1):

    ℓ_t  = e^{G_t} ∘ (q_t K̃₀ᵀ) + Σ_{j≤t} (q_t·k_j) s_j e^{G_t-G_j}        p_t = softmax(ℓ_t)
    a_tj = Σ_m p_tm s_jm e^{G_tm-G_jm}                                     (j ≤ t)
    o_t  = (p_t ∘ e^{G_t}) Ṽ₀ + Σ_{j≤t} a_tj v_j
    K̃₁   = e^{G_C} ∘ K̃₀ + Σ_j (s_j e^{G_C-G_j}) ⊗ k_j                     (Ṽ₁ likewise with v)

Taken literally e^{-G_j} overflows when gates are strong. So the factors e^{G_t} and s_j e^{-G_j} are used for the
rows t whose G_t is above -RANGE in every slot, and the remaining rows, if there are any, are computed
again from the differences G_t - G_j themselves. Which of the two a row takes depends on tokens up to t
only, and neither looks further, so o_t does not change by a bit when later tokens do.

Layout: tensors are cut into chunks [n, H, C, D], ordered by (position of the chunk in its sequence, sequence), the
longest sequence first. One step of the scan then works on one contiguous slice: the i-th chunks of all
sequences that have one. A batch [B, T] and packed sequences differ only in how they are cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .reference import empty_state, reference_step, write_strength
from .registry import Backend
from .validation import state_dtype

# Shorter chunks meet the strong-gate rows more rarely (a trained slot that always forgets has gates around -1) and
# cost little more: 32 and 64 take the same time on a CPU.
CHUNK = 32
# e^60 is about 1e26: products with q·k and sums over a chunk stay far inside float32 (3e38).
RANGE = 60.0
# e^g is exactly 0 in float64 from -746 down; a floor here keeps sums of huge gates finite and changes no bit.
FLOOR = -1e4


def chunk_forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens):
    """`gated_slot_attention` by chunks; arguments as there, already validated."""
    dtype = state_dtype(q)
    B, T, HQ, _ = q.shape
    H = k.shape[2]
    layout = _Padded(B, T) if cu_seqlens is None else _Packed(cu_seqlens, q.device)

    rows = layout.cut(q.to(dtype) * scale).unflatten(1, (H, HQ // H))  # [n, H, R, C, K]
    k, v, g = (layout.cut(x.to(dtype)) for x in (k, v, g.clamp(min=FLOOR)))  # [n, H, C, K | V | M]
    s = write_strength(g) if s is None else layout.cut(s.to(dtype))
    R, C = rows.shape[2:4]

    until = g.cumsum(dim=2)  # G_t
    write = (s * _sum_after(g).exp()).transpose(2, 3)  # s_j e^{G_C-G_j} [n, H, M, C]
    decay = until[:, :, -1].exp()  # [n, H, M]

    hk, hv = initial_state or empty_state(q, k.transpose(1, 2), v.transpose(1, 2), g, layout.sequences)
    hk, hv = layout.sort(hk.to(dtype).transpose(2, 3)), layout.sort(hv.to(dtype))
    k0, hk = _Scan.apply(decay, write @ k, hk, layout.waves)  # K̃ before each chunk [n, H, M, K]; after the last
    v0, hv = _Scan.apply(decay, write @ v, hv, layout.waves)

    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    scores = (rows.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, (R, C))  # q_t·k_j
    scores = scores.masked_fill(~causal, 0.0)
    old = (rows.flatten(2, 3) @ k0.transpose(2, 3)).unflatten(2, (R, C))  # q_t K̃₀ᵀ

    grown = until.exp()[:, :, None]  # [n, H, 1, C, M]
    shrunk = s * until.neg().clamp(max=RANGE).exp()  # s_j e^{-G_j}; no row that is kept reads a clamped one
    direct = (until < -RANGE).any(dim=-1)  # [n, H, C]: rows to be computed from differences
    some_direct = bool(direct.any())

    logits = grown * (old + (scores.flatten(2, 3) @ shrunk).unflatten(2, (R, C)))
    if some_direct:
        chunks = direct.any(dim=-1).any(dim=-1).nonzero()[:, 0]
        weights = _Differences(g[chunks], s[chunks])
        again = grown[chunks] * old[chunks] + weights.logits(scores[chunks])
        logits = _replace_rows(logits, again, chunks, direct)
    p = logits.softmax(dim=-1)

    read = p * grown
    a = (read.flatten(2, 3) @ shrunk.transpose(2, 3)).unflatten(2, (R, C))
    a = a.masked_fill(~causal, 0.0)
    if some_direct:
        a = _replace_rows(a, weights.attention(p[chunks]), chunks, direct)
    o = read.flatten(2, 3) @ v0 + a.flatten(2, 3) @ v  # [n, H, R·C, V]

    o = layout.join(o.unflatten(2, (R, C)).flatten(1, 2)).to(q.dtype)
    if not output_final_state:
        return o, None
    return o, (layout.unsort(hk).transpose(2, 3).contiguous(), layout.unsort(hv))


def _replace_rows(x: Tensor, again: Tensor, chunks: Tensor, direct: Tensor) -> Tensor:
    """x [n, H, R, C, D] with the rows marked in `direct` [n, H, C] taken from `again` (its chunks only)."""
    mixed = torch.where(direct[chunks][:, :, None, :, None], again, x[chunks])
    return x.index_copy(0, chunks, mixed)


class _Differences:
    """Σ with the weights s_j e^{G_t-G_j}, exact for any gates: nothing larger than s_j is ever formed.

    Rows are taken in blocks that begin at some b. For columns before b the exponent is split there,
    G_t - G_j = (G_t - G_{b-1}) + (G_{b-1} - G_j), both parts ≤ 0, and the sum is a matrix product; inside the block
    weights are formed one by one, [BLOCK, BLOCK, M] numbers. Every exponent is summed from the gates between its
    ends, so no large numbers cancel. Blocks are checkpointed: the backward forms their weights again.
    """

    BLOCK = 8

    def __init__(self, g: Tensor, s: Tensor):
        self.g, self.s = g, s

    def logits(self, scores: Tensor) -> Tensor:
        """Σ_j scores_tj s_j e^{G_t-G_j}: [n, H, R, C, C] → [n, H, R, C, M]."""

        def block(x, near, row, column):
            inside = torch.einsum("nhrtj,nhtjm->nhrtm", x[..., -near.shape[3] :], near)
            earlier = x[..., : column.shape[2]]
            return inside + row[:, :, None] * (earlier @ column[:, :, None])

        return torch.cat(self._by_blocks(lambda a, b: scores[..., a:b, :b], block), dim=3)

    def attention(self, p: Tensor) -> Tensor:
        """a_tj = Σ_m p_tm s_jm e^{G_tm-G_jm}: [n, H, R, C, M] → [n, H, R, C, C]."""
        C = self.g.shape[2]

        def block(x, near, row, column):
            inside = torch.einsum("nhrtm,nhtjm->nhrtj", x, near)
            earlier = (x * row[:, :, None]) @ column[:, :, None].transpose(3, 4)
            return F.pad(torch.cat([earlier, inside], dim=-1), (0, C - earlier.shape[-1] - inside.shape[-1]))

        return torch.cat(self._by_blocks(lambda a, b: p[..., a:b, :], block), dim=3)

    def _by_blocks(self, rows, block) -> list[Tensor]:
        def weighted(x, g, s, size):
            return block(x, *self._weights(g, s, size))

        C = self.g.shape[2]
        bounds = [(a, min(a + self.BLOCK, C)) for a in range(0, C, self.BLOCK)]
        return [
            checkpoint(weighted, rows(a, b), self.g[:, :, :b], self.s[:, :, :b], b - a, use_reentrant=False)
            for a, b in bounds
        ]

    @staticmethod
    def _weights(g: Tensor, s: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the block of the last `size` tokens: weights inside it [n, H, size, size, M], and the two factors for
        earlier columns: of its rows [n, H, size, M], and of the columns before it [n, H, ·, M]."""
        before, here = g[:, :, :-size], g[:, :, -size:]
        t = torch.arange(size, device=g.device)
        later = (t[:, None] > t[None, :])[..., None]  # gate t counts for the columns before it
        sums = torch.where(later, here[:, :, :, None], 0.0).cumsum(dim=2)
        seen = (t[:, None] >= t[None, :])[..., None]
        near = torch.where(seen, sums.exp() * s[:, :, None, -size:], 0.0)
        return near, here.cumsum(dim=2).exp(), s[:, :, :-size] * _sum_after(before).exp()


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
    @once_differentiable
    def backward(ctx, grad_before, grad_final):
        decay, before = ctx.saved_tensors
        grad_update = torch.empty_like(before)
        grad = grad_final.clone()
        end = before.shape[0]
        for wave in reversed(ctx.waves):
            start = end - wave
            grad_update[start:end] = grad[:wave]
            torch.addcmul(grad_before[start:end], decay[start:end, :, :, None], grad_update[start:end], out=grad[:wave])
            end = start
        grad_decay = (grad_update * before).sum(dim=-1)
        return grad_decay, grad_update, grad, None


class _Padded:
    """How a batch [B, T, H, D] is cut: each sequence padded to whole chunks."""

    def __init__(self, B: int, T: int):
        self.B, self.T = B, T
        self.sequences = B
        self.C = min(CHUNK, T)
        self.chunks = -(-T // self.C)
        self.waves = [B] * self.chunks

    def cut(self, x: Tensor) -> Tensor:
        if short := self.chunks * self.C - self.T:
            x = F.pad(x, (0, 0, 0, 0, 0, short))
        return x.unflatten(1, (self.chunks, self.C)).permute(1, 0, 3, 2, 4).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (self.chunks, self.B)).permute(1, 0, 3, 2, 4)
        return x.flatten(1, 2)[:, : self.T]

    def sort(self, state: Tensor) -> Tensor:
        return state

    def unsort(self, state: Tensor) -> Tensor:
        return state


class _Packed:
    """How packed sequences [1, N, H, D] are cut: each padded to whole chunks, the longest first."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device):
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        self.sequences = lengths.numel()
        self.C = min(CHUNK, int(lengths.max()))
        chunks = (lengths + self.C - 1) // self.C
        order = chunks.argsort(descending=True, stable=True)
        self.waves = [int((chunks > i).sum()) for i in range(int(chunks.max()))]

        # Chunk c of the i-th wave begins at start[c] and has size[c] real tokens; the rest is padding,
        # read from one extra row of zeros behind the last token.
        start, size = [], []
        for i, wave in enumerate(self.waves):
            which = order[:wave]
            start.append(bounds[which] + i * self.C)
            size.append((lengths[which] - i * self.C).clamp(max=self.C))
        position = torch.arange(self.C)
        first, real = torch.cat(start)[:, None], position < torch.cat(size)[:, None]
        tokens = int(bounds[-1])
        gather = torch.where(real, first + position, tokens).flatten()
        scatter = torch.empty(tokens, dtype=torch.int64)
        scatter[gather[real.flatten()]] = real.flatten().nonzero()[:, 0]

        self.gather, self.scatter = gather.to(device), scatter.to(device)
        self.order, self.back = order.to(device), order.argsort().to(device)

    def cut(self, x: Tensor) -> Tensor:
        x = _Permute.apply(F.pad(x[0], (0, 0, 0, 0, 0, 1)), self.gather, self.scatter)
        return x.unflatten(0, (-1, self.C)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.scatter)[None]

    def sort(self, state: Tensor) -> Tensor:
        return state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state[self.back]


class _Permute(torch.autograd.Function):
    """x[gather], where every row but the last (padding) is taken exactly once: its gradient is a gather too."""

    @staticmethod
    def forward(ctx, x, gather, scatter):
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (scatter,) = ctx.saved_tensors
        return F.pad(grad.index_select(0, scatter), (0, 0, 0, 0, 0, 1)), None, None


BACKEND = Backend(
    name="chunk",
    forward=chunk_forward,
    unsupported=lambda problem: None,
    priority=10,
    step=reference_step,
)
