"""Rotary positions: queries and keys turned by angles that grow with the token's place in its sequence."""

import torch
from torch import Tensor

from .convolution import positions


def rotation(position: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position·θ^{-2i/D} for i < D/2.

    Args:
        position: [..., T] whole numbers.
        width: D, the head dimension, even.
        theta: θ.

    Returns:
        Two tensors [..., T, 1, D/2] in float64: in float32 the angle of token 10⁶ would be off by 0.06.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    pair = torch.arange(0, width, 2, device=position.device, dtype=torch.float64)
    angle = position.double()[..., None] * theta ** (-pair / width)
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] with the pairs (i, i + D/2) of each head turned, computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide), sin.to(wide)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def count_tokens(
    x: Tensor, seen: Tensor | int, attention_mask: Tensor | None, cu_seqlens: Tensor | None, first: int = 0
) -> tuple[Tensor, Tensor | int]:
    """Each token's place among the real tokens of its sequence.

    Args:
        x: [B, T, d], the piece to be counted.
        seen: real tokens of each sequence before it: [N], or one number for all.
        attention_mask: [B, T] or None; padding is not counted.
        cu_seqlens: [S+1] boundaries of packed sequences or None.
        first: tokens before the first of x that another process has; `cu_seqlens` counts them.

    Returns:
        The places [B, T] ([T] where all rows agree), and `seen` after this piece.
    """
    T = x.shape[1]
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(x.device, torch.int64)
        place = positions(cu_seqlens, T, x.device, first)
        if isinstance(seen, Tensor):
            token = torch.arange(first, first + T, device=x.device)
            place = place + seen[torch.searchsorted(bounds, token, right=True) - 1]
        return place, seen + bounds.diff()
    start = first + (seen[:, None] if isinstance(seen, Tensor) else seen)
    if attention_mask is None:
        return start + torch.arange(T, device=x.device), seen + T
    real = attention_mask.long()
    return start + real.cumsum(1) - 1, seen + real.sum(1)
