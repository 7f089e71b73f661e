"""Linear maps with what lies before or beside them, for a backward that keeps and moves less.

PyTorch keeps the input of every map, and sums the gradients of maps that share one in launches of their own. On a GPU
the functions here are autograd functions that do neither; elsewhere and in float64 they are their equations. The
products themselves are cuBLAS's in either case.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import pointwise
from .once import once_differentiable
from .products import as_autocast, product
from .triton.available import runs_on


def shared_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Several maps of one input: y_i = x W_iᵀ.

    The backward adds up dx = Σ_i dy_i W_i inside the products. Under autocast x is cast once for all, and kept once;
    the gradient of a float32 weight is what the product of bf16 or fp16 numbers sums up, not rounded to these first.

    Args:
        x: [..., D], floating point.
        weights: W_i [N_i, D].

    Returns:
        y_i [..., N_i], as `F.linear` gives them. Under torch.compile it is `F.linear`.
    """
    if not torch.is_grad_enabled() or not pointwise.uses_kernels(x):
        return tuple(F.linear(x, weight) for weight in weights)
    return _SharedLinears.apply(*as_autocast(x), *weights)


def swiglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """y = (SiLU(gate) ∘ up) W_downᵀ with gate = x W_gateᵀ and up = x W_upᵀ, of which the backward keeps these two.

    It needs the product once more, for dW_down; the kernel that reads gate and up for their gradients writes it as
    well. The two gradients of x are added up as in `shared_linears`.

    Args:
        x: [..., D], floating point.
        gate_weight, up_weight: W_gate, W_up [I, D].
        down_weight: W_down [N, I].

    Returns:
        y [..., N]. Under torch.compile, which would keep the product, SiLU(gate) ∘ up and its map are one operator.
    """
    if torch.compiler.is_compiling() and runs_on(x):
        return swiglu_linear_op(F.linear(x, gate_weight), F.linear(x, up_weight), *as_autocast(down_weight))
    if not pointwise.uses_kernels(x):
        return F.linear(F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight), down_weight)
    return _SwigluMlp.apply(*as_autocast(x.contiguous()), gate_weight, up_weight, down_weight)


def silu_norm_linear(x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor) -> Tensor:
    """y = RMSNorm(SiLU(x)) Wᵀ, of which the backward keeps x and a number a row, and not the norm's result.

    It needs that once more, for dW; the kernel that reads x for its gradient writes it as well.

    Args:
        x: [..., I], floating point.
        norm_weight: of the norm [I], or None for no weight; eps: its ε.
        weight: W [D, I], of the dtype of x but for autocast.

    Returns:
        y [..., D].
    """
    if x.shape[-1] > pointwise.WIDEST_ROW or not pointwise.uses_kernels(x):
        return F.linear(pointwise.silu_norm(x, norm_weight, eps), weight)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    return _SiluNormLinear.apply(x.contiguous(), norm_weight, eps, weight)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _SharedLinears(Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.dtypes = [weight.dtype for weight in weights]
        weights = as_autocast(*weights)
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *outgoing):
        x, *weights = ctx.saved_tensors
        return _shared_gradients(x, weights, ctx.dtypes, outgoing, ctx.needs_input_grad)


def _shared_gradients(x, weights, dtypes, outgoing, wanted) -> tuple[Tensor | None, ...]:
    """dx and every dW_i, in dtypes of its own, as far as wanted and as there is a dy_i."""
    wants_x, *wants_weights = wanted
    dx: Tensor | None = None
    found: list[Tensor | None] = []
    for dy, weight, dtype, wants_weight in zip(outgoing, weights, dtypes, wants_weights, strict=True):
        if dy is None:
            found.append(None)
            continue
        if wants_x:
            dx = _rows(dy) @ weight if dx is None else dx.addmm_(_rows(dy), weight)
        found.append(product(_rows(dy).t(), _rows(x), dtype) if wants_weight else None)
    return None if dx is None else dx.view(x.shape), *found


class _SwigluMlp(Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.dtypes = [weight.dtype for weight in weights]
        gate_weight, up_weight, down_weight = as_autocast(*weights)
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return F.linear(pointwise.kernels.swiglu_product(gate, up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        *wanted, wants_down = ctx.needs_input_grad
        # As AOTAutograd asks whether what was saved may be needed again (retain_graph=True). Else it is ours alone.
        last_use = not torch._C._autograd._get_current_graph_task_keep_graph()
        *dtypes, of_down = ctx.dtypes
        dgate, dup, ddown = _swiglu_gradients(dy, gate, up, down_weight, of_down, wants_down, last_use)
        return *_shared_gradients(x, (gate_weight, up_weight), dtypes, (dgate, dup), wanted), ddown


def _swiglu_gradients(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, dtype: torch.dtype, wants_weight: bool, last_use: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate, dup and, if wanted, dW of (SiLU(gate) ∘ up) Wᵀ, that in `dtype`.

    With last_use the first two lie where gate and up were.
    """
    inner = _rows(dy) @ weight  # the gradient of SiLU(gate) ∘ up, which gives its place to that itself
    dgate, dup = pointwise.kernels.swiglu_gradients(gate, up, inner, wants_weight, last_use)
    return dgate, dup, product(_rows(dy).t(), inner, dtype) if wants_weight else None


class _SiluNormLinear(Function):
    @staticmethod
    def forward(ctx, x, norm_weight, eps, weight):
        normed, inverse = pointwise.kernels.silu_normed(x, norm_weight, eps)
        ctx.dtype = weight.dtype
        (weight,) = as_autocast(weight)
        ctx.save_for_backward(x, norm_weight, inverse, weight)
        return F.linear(normed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, norm_weight, inverse, weight = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[3]
        normed = _rows(dy) @ weight  # its gradient, which gives its place to the norm's result itself
        dx, dnorm_weight = pointwise.kernels.silu_norm_gradients(x, norm_weight, inverse, normed, again=wants_weight)
        return dx, dnorm_weight, None, product(_rows(dy).t(), normed, ctx.dtype) if wants_weight else None


@torch.library.custom_op("flash_gsa::swiglu_linear", mutates_args=())
def swiglu_linear_op(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(SiLU(gate) ∘ up) Wᵀ: gate, up [..., I] and W [D, I] of one dtype → [..., D]."""
    return F.linear(pointwise.kernels.swiglu_product(gate.contiguous(), up.contiguous()), weight)


@swiglu_linear_op.register_fake
def _(gate, up, weight):
    return gate.new_empty(*gate.shape[:-1], weight.shape[0])


@torch.library.custom_op("flash_gsa::swiglu_linear_backward", mutates_args=())
def swiglu_linear_backward_op(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup, dW; an operator cannot return None, so a dW that nobody wants is an empty tensor."""
    dgate, dup, dweight = _swiglu_gradients(
        dy, gate.contiguous(), up.contiguous(), weight, weight.dtype, wants_weight, False
    )
    return dgate, dup, weight.new_empty(0) if dweight is None else dweight


@swiglu_linear_backward_op.register_fake
def _(dy, gate, up, weight, wants_weight):
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    return dgate, dup, weight.new_empty(weight.shape if wants_weight else 0)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    wants_weight = ctx.needs_input_grad[2]
    dgate, dup, dweight = swiglu_linear_backward_op(dy, *ctx.saved_tensors, wants_weight)
    return dgate, dup, dweight if wants_weight else None


swiglu_linear_op.register_autograd(_backward, setup_context=_save)
