"""Whether kernels beside the backend's can run: those of gates, activations and norms."""

import torch
from torch import Tensor

from .backend import INTERPRETED, triton


def runs_on(x: Tensor) -> bool:
    """Whether a Triton kernel can take x: on a CUDA device (anywhere in the interpreter), not empty, not float64."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64 and x.numel() > 0
