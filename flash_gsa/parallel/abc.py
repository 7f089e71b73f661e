"""ABC's gates over several processes: the running normalizer starts where the process before has stopped.

    z before stretch r = log Σ_{i<r} e^{z_i},     z_i = log Σ_t e^{l_t} over the tokens of stretch i

A process sends one number a slot, whatever the length.
"""

import torch
from torch import Tensor

from ..errors import UsageError
from ..ops import abc_gates
from ..ops.gates import NOTHING
from .exchange import Gather, Group, Tied, part_of, place


@torch.compiler.disable
def context_parallel_abc_gates(
    logits: Tensor, *, group: Group = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`abc_gates` of sequences of which each process of `group` holds a stretch, in the order of its ranks.

    Collective: all processes of the group must call it, and run its backward, in the same order.

    Args:
        logits: this process's tokens [B, T, H, M], any finite floating-point numbers.
        group: the processes; None: all.
        cu_seqlens: boundaries of sequences packed along all processes, as in `context_parallel_gated_slot_attention`.

    Returns:
        g, s [B, T, H, M] of this process's tokens, float32 (float64 for float64 logits).

    Raises:
        UsageError: as in `abc_gates`; no process group is initialised; no tokens; boundaries that do not end at
            ranks · T.
    """
    rank, ranks = place(group)
    if ranks == 1 or logits.dim() != 4:  # which abc_gates refuses
        g, s = abc_gates(logits, cu_seqlens=cu_seqlens)
        return g, s
    if logits.shape[1] == 0:
        raise UsageError(f"every process needs tokens, got logits {list(logits.shape)} on rank {rank}")
    part = part_of(cu_seqlens, logits.shape, rank, ranks)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    own = wide[:, part.last :].logsumexp(1)
    every = Gather.apply(own, group)
    before = every[part.before]
    z = before.logsumexp(0) if len(before) else Tied.apply(torch.full_like(own, NOTHING), every)
    if part.boundaries is not None:
        # One normalizer for each of its sequences, of which only the first can have one.
        z = torch.cat([z, torch.full_like(z, NOTHING).expand(part.boundaries.numel() - 2, -1, -1)])
    g, s = abc_gates(logits, initial_normalizer=z, cu_seqlens=part.boundaries)
    return g, s
