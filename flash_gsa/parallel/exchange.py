"""What the processes of a group tell each other, and what each needs to know of the others.

Collectives here are functions of autograd: their backward is a collective, too, which every process must take part in,
also one that has needed nothing of what it got. `Tied` sees to that. Autograd runs a graph from its last operation to
its first, so all processes meet in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..errors import UsageError
from ..ops.once import once_differentiable
from ..ops.registry import State
from ..ops.validation import check_cu_seqlens

Group = dist.ProcessGroup | None


def place(group: Group) -> tuple[int, int]:
    """This process's rank in the group, and how many ranks it has.

    Raises:
        UsageError: no process group is initialised, or this process is not in this one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "context parallelism runs in the processes of torch.distributed, and no process group is initialised; "
            "start the program with torchrun and call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError("this process is not part of the group; only its processes may call")
    return rank, dist.get_world_size(group)


@dataclass(frozen=True)
class Part:
    """A process's part of sequences that lie over all ranks.

    rank: its own. begun: the rank that has the beginning of the sequence its first token belongs to, `rank` if that is
    the beginning. last: of its tokens, the first of the last sequence. boundaries: of its own tokens' sequences, on
    the CPU; None where sequences are not packed.
    """

    rank: int
    begun: int
    last: int = 0
    boundaries: Tensor | None = None

    @property
    def before(self) -> slice:
        """The ranks whose last sequence is this process's first one."""
        return slice(self.begun, self.rank)


def part_of(cu_seqlens: Tensor | None, shape: torch.Size, rank: int, ranks: int) -> Part:
    """Which part tokens [B, T, …] on this rank are, `cu_seqlens` being the boundaries along all ranks.

    Raises:
        UsageError: boundaries that do not end at ranks · T, or with B > 1.
    """
    if cu_seqlens is None:
        return Part(rank, 0)
    B, T = shape[:2]
    check_cu_seqlens(cu_seqlens, torch.Size((B, ranks * T, *shape[2:])))
    starts = cu_seqlens.cpu().long().unique()
    first, end = rank * T, (rank + 1) * T
    inside = starts[(starts > first) & (starts < end)] - first
    boundaries = torch.cat([torch.tensor([0]), inside, torch.tensor([T])])
    began = int(starts[starts <= first][-1])
    return Part(rank, rank if began == first else began // T, int(boundaries[-2]), boundaries)


class Gather(Function):
    """x of every process [ranks, ...]; backward, the sum of what all of them want of this one's."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)  # it is not ours to change
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class Tied(Function):
    """x, whose backward does not run without that of the others."""

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(y.shape, y.dtype) for y in others]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


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
        total = summed(parts)
        return total[..., :K].contiguous(), total[..., K:].contiguous()


def summed(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Σ of parts [B, H, M, · + 1] without their last column, D, each times e^D of all that follow it."""
    total = parts[0][..., :-1]
    for part in parts[1:]:
        total = part[..., -1:].exp() * total + part[..., :-1]
    return total
