"""Modules around products that are computed together where nobody minds."""

from torch import Tensor, nn

from ..ops.linears import shared_linears, silu_norm_linear
from .norm import RMSNorm, SiluRMSNorm


def projections(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """`map(x)` of each: x [..., D] → [..., N_i]."""
    if all(is_product(linear) for linear in maps):
        return shared_linears(x, *(linear.weight for linear in maps))
    return tuple(linear(x) for linear in maps)


def normed_projection(x: Tensor, norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """`linear(norm(x))`: [..., I] → [..., D]."""
    if type(norm) is SiluRMSNorm and is_unwatched(norm) and is_product(linear):
        return silu_norm_linear(x, norm.weight, norm.epsilon, linear.weight)
    return linear(norm(x))


def is_product(linear: nn.Module) -> bool:
    """Whether to call this module is to multiply by its weight; adapters and quantised layers are of other types."""
    return type(linear) is nn.Linear and linear.bias is None and is_unwatched(linear)


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody would see that a module is not called. DeepSpeed's ZeRO-3 gathers weights in hooks."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)
