"""What is differentiated by a backward of its own: when that is wanted, and that it is all there is."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from flash_gsa.errors import UsageError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `Function.backward` whose results raise UsageError when they are differentiated.

    PyTorch's decorator of that name attaches its error to what flows into the gradients alone. A derivative by
    something that was saved, as in `autograd.grad(dk, q)`, goes around it, and what is missing counts as 0.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *outgoing: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # nobody keeps a graph of this backward
            return backward(ctx, *outgoing)
        noted = _Context(ctx)
        with torch.no_grad():
            found = backward(noted, *outgoing)
        gradients = found if isinstance(found, tuple) else (found,)
        given = [x for x in (*outgoing, *noted.saved) if x is not None and x.requires_grad]
        there = [x for x in gradients if x is not None]
        if given and there:
            name = backward.__qualname__.split(".")[0].lstrip("_")
            refusing = iter(_Refused.apply(name, len(there), *there, *given))
            gradients = tuple(None if x is None else next(refusing) for x in gradients)
        return gradients if isinstance(found, tuple) else gradients[0]

    return once


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether derivatives by one of them may be asked for: backwards; or in forward mode, of which a function with a
    backward of its own says that it has it not, and what runs beside autograd would say 0."""
    if forward_ad._current_level >= 0:  # somebody is within `forward_ad.dual_level()`
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _Context:
    """A function's context that notes what was saved: a checkpoint gives it once only."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved: tuple[Tensor | None, ...] = ()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ctx, name)
        if name == "saved_tensors":
            self.saved = found
        return found


class _Refused(Function):
    """The first `count` of the tensors, by which nobody can go back to the others."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *outgoing: Tensor) -> Any:
        refuse_second_derivative(ctx.name)


def refuse_second_derivative(name: str) -> NoReturn:
    """Raises UsageError for a function of that name."""
    raise UsageError(
        f"{name} can be differentiated once, and a second derivative was asked for. The operators have it with "
        "backend='chunk' or 'reference'; the loss of a model, and kernels, do not."
    )
