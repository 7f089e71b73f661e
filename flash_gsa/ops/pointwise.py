"""What lies between the products and the operator of a block: activations, gates, norms, sums.

Each is little arithmetic on much memory, so what counts is how often a number is read and written. On a GPU each
function here is one Triton kernel forward and one backward; elsewhere, in float64, and under torch.compile, which fuses
such chains by itself, it is its equation in PyTorch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import product_dtype
from .triton.available import runs_on

try:
    from .triton import pointwise as kernels
except ModuleNotFoundError as error:  # torch's CPU build brings no Triton
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

# A row of a norm is held in registers as a whole.
WIDEST_ROW = 8192

_separately = ContextVar("separately", default=False)


def silu_each(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of each: x σ(x), in x's dtype.

    Args:
        q, k, v: floating-point tensors of any shapes.

    Returns:
        Tensors of the same shapes and dtypes.
    """
    if not uses_kernels(q, k, v):
        return F.silu(q), F.silu(k), F.silu(v)
    return kernels.silu_each(q, k, v)


def log_gates(logits: Tensor, normalizer: float) -> Tensor:
    """Log forget gates: g = log σ(f) / τ in float32.

    Args:
        logits: f, a floating-point tensor of any shape.
        normalizer: τ > 0.

    Returns:
        g ≤ 0, float32, of the same shape.
    """
    if not uses_kernels(logits):
        return F.logsigmoid(logits.float()) / normalizer
    return kernels.log_gates(logits, normalizer)


def silu_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of SiLU over the last dimension: y = a / √(mean(a²) + ε) ∘ w with a = x σ(x).

    Args:
        x: [..., D], floating point.
        weight: w [D], or None for no weight.
        eps: ε.

    Returns:
        y [..., D] in x's dtype. The kernel computes in float32 throughout; the weight's gradient is summed in a fixed
        order, so that the same call gives the same bits.
    """
    if x.shape[-1] > WIDEST_ROW or not uses_kernels(x):
        # A weight of another dtype would keep PyTorch from its fused norm.
        return F.rms_norm(F.silu(x), x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    return kernels.silu_norm(x, weight, eps)


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A sum and its RMSNorm over the last dimension: h = x + b and y = h / √(mean(h²) + ε) ∘ w.

    What is fused besides is the backward: the gradient of h from elsewhere is added where that of the norm is written.
    For that alone it may be called without a branch.

    Args:
        x: [..., D], floating point.
        branch: b [..., D], or None for h = x.
        weight: w [D], or None for no weight.
        eps: ε.

    Returns:
        h and y [..., D], in the dtype of x + b; under autocast y is in autocast's, to which the products that read it
        would cast it. Kept for the backward are h and a number a row. The weight's gradient is summed in a fixed order.
    """
    summands = (x,) if branch is None else (x, branch)
    if x.shape[-1] > WIDEST_ROW or not uses_kernels(*summands) or summands[-1].shape != x.shape:
        h = x if branch is None else x + branch
        normed = F.rms_norm(h, h.shape[-1:], None if weight is None else weight.to(h.dtype), eps)
        return h, normed.to(product_dtype(h))
    return kernels.add_norm(x, branch, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) ∘ up, in their dtype; kept for the backward are the two.

    Args:
        gate, up: floating-point tensors of one shape and dtype.
    """
    if not uses_kernels(gate, up) or (gate.shape, gate.dtype) != (up.shape, up.dtype):
        return F.silu(gate) * up
    return kernels.swiglu(gate, up)


@contextmanager
def separate() -> Iterator[None]:
    """Within it, each function here is its equation in PyTorch everywhere: what the kernels are measured against."""
    before = _separately.set(True)
    try:
        yield
    finally:
        _separately.reset(before)


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether a function of these is a kernel here and now, and no equation in PyTorch."""
    if torch.compiler.is_compiling() or _separately.get():
        return False
    return all(runs_on(x) for x in tensors)
