"""RMSNorm that follows the dtype of its input: alone, after SiLU, after a sum."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.pointwise import add_norm, silu_norm


class RMSNorm(nn.RMSNorm):
    """y = x / √(mean(x²) + ε) ∘ w over the last dimension, [..., D] → [..., D] in x's dtype.

    nn.RMSNorm, but with the weight in x's dtype: under autocast x may be bfloat16 beside a float32 weight, for which
    PyTorch leaves its fused kernel. The mean is float32 either way. Source: Zhang and Sennrich, 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class SiluRMSNorm(RMSNorm):
    """y = RMSNorm(SiLU(x)) over the last dimension, [..., D] → [..., D] in x's dtype: on a GPU one pass over memory.

    Args:
        dim: D.
        eps: ε of the norm.
        elementwise_affine: with a learned weight [D].
    """

    def __init__(self, dim: int, eps: float, elementwise_affine: bool = True):
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return silu_norm(x, self.weight, self.epsilon)


class AddRMSNorm(RMSNorm):
    """h = x + b and RMSNorm(h): the residual stream with a branch added, and what the next branch reads of it.

    x, b [..., D] → both [..., D], the norm under autocast in autocast's dtype: on a GPU one pass over memory. Without a
    branch h is x. Whoever goes on from the h that is returned, instead of from x, has both gradients of x added up in
    one pass.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps=eps)
        self.epsilon = eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return add_norm(x, branch, self.weight, self.epsilon)
