"""RMSNorm that follows the dtype of its input, alone and after SiLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.pointwise import silu_norm


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
