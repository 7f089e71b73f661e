"""Short causal depthwise convolution over time, the local mixing before q, k and v."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feature_maps import ACTIVATIONS
from .sequences import WholeSequences


class ShortConvolution(nn.Module):
    """y_t = ψ(Σ_{i<W} w_i ∘ x_{t-W+1+i}), each channel on its own, inputs before the sequence being 0.

    Args:
        channels: D.
        width: W ≥ 2 taps.
        activation: ψ, "swish" or "identity".
    """

    def __init__(self, channels: int, width: int = 4, activation: str = "swish"):
        super().__init__()
        self.channels, self.width = channels, width
        self.activation = ACTIVATIONS[activation]
        self.sequences = WholeSequences()
        # [D, 1, W] as in nn.Conv1d and in published checkpoints.
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"

    def forward(
        self,
        x: Tensor,
        *,
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve x [B, T, D].

        Args:
            tail: the last W-1 inputs of the piece before, [B, W-1, D]; None: as `sequences` says, zeros at the start
                of a sequence.
            cu_seqlens: [S+1] boundaries of packed sequences; no tap reaches across one. Excludes `tail`.
            attention_mask: [B, T], 0 for padding, where x is 0: what follows the last token is left out of the tail.

        Returns:
            y [B, T, D] and the tail for the next piece [B, W-1, D].
        """
        if tail is None:
            tail = self.sequences.before(x, self.width - 1)
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        if x.shape[1] == 0:
            y = x  # which conv1d refuses
        elif cu_seqlens is None:
            y = F.conv1d(padded.transpose(1, 2), self.weight, groups=self.channels).transpose(1, 2)
        else:
            y = self._packed(padded, cu_seqlens)
        return self.activation(y), self._tail(padded, attention_mask)

    def _tail(self, padded: Tensor, mask: Tensor | None) -> Tensor:
        """The W-1 inputs up to the last token, in memory of its own: a cache would keep all of `padded` for a view."""
        T = padded.shape[1] - self.width + 1
        if mask is None or T == 0:
            return padded[:, T:].clone()
        end = (mask.bool() * torch.arange(1, T + 1, device=padded.device)).amax(dim=1)
        at = end[:, None] + torch.arange(self.width - 1, device=padded.device)
        return padded.take_along_dim(at[..., None], dim=1)

    def _packed(self, padded: Tensor, cu_seqlens: Tensor) -> Tensor:
        T = padded.shape[1] - self.width + 1
        position = positions(cu_seqlens, T, padded.device, self.sequences.first(T))[None, :, None]
        y = torch.zeros_like(padded[:, :T])
        for back in range(self.width):
            shifted = padded[:, self.width - 1 - back : self.width - 1 - back + T]
            tap = self.weight[:, 0, self.width - 1 - back]
            y = y + torch.where(position >= back, shifted, 0.0) * tap
        return y


def positions(cu_seqlens: Tensor, length: int, device: torch.device, first: int = 0) -> Tensor:
    """The positions of `length` packed tokens from the one numbered `first` on, each in its own sequence: [length]
    int64."""
    bounds = cu_seqlens.to(device, torch.int64)
    token = torch.arange(first, first + length, device=device)
    return token - bounds[torch.searchsorted(bounds, token, right=True) - 1]
