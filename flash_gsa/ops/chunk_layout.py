"""How sequences are cut into chunks of C tokens, and joined again.

Tensors become [n, H, C, D], the chunks ordered by (position of the chunk in its sequence, sequence), the longest
sequence first. One step of a scan over chunks then works on one contiguous slice: the i-th chunks of all sequences that
have one, `waves[i]` of them. A batch [B, T] and packed sequences differ only in how they are cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shorter chunks meet the strong-gate rows more rarely (a trained slot that always forgets has gates around -1) and
# cost little more: 32 and 64 take the same time on a CPU.
CHUNK = 32


def layout_of(q: Tensor, cu_seqlens: Tensor | None) -> "Padded | Packed":
    """The layout for inputs like q [B, T, HQ, K], packed if `cu_seqlens` says so."""
    return Padded(q.shape[0], q.shape[1]) if cu_seqlens is None else Packed(cu_seqlens, q.device)


class Padded:
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


class Packed:
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
    def backward(ctx, grad):
        (scatter,) = ctx.saved_tensors
        return F.pad(grad.index_select(0, scatter), (0, 0, 0, 0, 0, 1)), None, None
