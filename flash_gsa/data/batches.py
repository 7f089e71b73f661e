"""What a model is trained on."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

NOT_SCORED = -100


@dataclass(frozen=True)
class Batch:
    """Tokens and what is to be predicted at each of them.

    Attributes:
        input_ids: `[B, T]` int64; packed text has B = 1.
        targets: `[B, T]` int64. `targets[b, t]` is to be predicted **at** position t, from
            `input_ids[b, : t + 1]`: it is already shifted. −100: not scored.
        cu_seqlens: `[S + 1]` int32 on the CPU, or None. Sequence i of a packed batch is positions
            `cu_seqlens[i]` … `cu_seqlens[i + 1] − 1`; no state crosses from one to the next.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Self:
        """The same batch with tokens and targets on `device`; `cu_seqlens` stays on the CPU."""
        return replace(self, input_ids=_moved(self.input_ids, device), targets=_moved(self.targets, device))


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    # From pinned memory the copy runs beside the computation instead of waiting for it.
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
