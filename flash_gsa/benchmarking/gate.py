"""Values first: nothing is timed before it has been compared with its definition in float64.

At small sizes (an odd length, two chunks and a tail; for this package also grouped queries with an odd number of slots)
o, the final states and the gradients are compared with the recurrence. At the size that is timed they are compared with
the chunkwise form in float64, which is a backend of its own: a kernel may take another path for long sequences. Of
other packages' operators o and the gradients are, which is what is timed of them.

The distance is ‖x - exact‖ / ‖exact‖. It is judged by that of the definition where every matrix product takes its
factors in the inputs' format (`rounded_products`), which no implementation with matrix units can do without: for 16
bits the chunkwise form in float32 with such products, for float32 the definition. Allowed is twice that for this
package, `TIMES_OTHERS` times that for others, half a unit of the result's format, and what float32 loses in sums of
another order. For o of the 1.3B layer in bfloat16 this makes 0.9 %, for dg 3.4 %, of which 1.5 % are the products'.
FLA 0.6.0, which keeps more between its kernels in 16 bits, is 2.4 times as far off as they in dg and ds: it is right,
and is allowed three times.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .implementations import Implementation, Ours, Tensors, recurrence
from .rounded import rounded_products
from .shapes import Shape

TIMES, TIMES_OTHERS = 2.0, 3.0
SUMS = 6 * torch.finfo(torch.float32).eps
AGREE = 1e-9
"""How near two forms of one definition must be in float64."""
SMALL_LENGTHS = (37, 130)
SMALL_BATCH = 3
"""A batch that is never timed: what tunes itself for a batch shall not do so on short sequences."""
GROUPED = Shape("grouped", 2, 70, HQ=4, H=2, K=64, V=64, M=40)
PIECE = 16384


@dataclass(frozen=True)
class Errors:
    """Distance of each result from float64, and what is allowed: {name: (distance, limit)}."""

    found: dict[str, tuple[float, float]]

    @property
    def problem(self) -> str | None:
        """None, or "dq is off by 3.1e-01 of its norm (allowed: 3.2e-02)" for what is worst."""
        if not self.found:
            return None
        name, (distance, limit) = max(self.found.items(), key=lambda item: _share(*item[1]))
        return None if distance <= limit else f"{name} is off by {distance:.1e} of its norm (allowed: {limit:.1e})"

    def worst(self, other: "Errors") -> "Errors":
        """Of each result the pair that is nearer to its limit, or further beyond it."""
        names = dict.fromkeys([*self.found, *other.found])
        pairs = {name: [e.found[name] for e in (self, other) if name in e.found] for name in names}
        return Errors({name: max(pair, key=lambda p: _share(*p)) for name, pair in pairs.items()})


def _share(distance: float, limit: float) -> float:
    return distance / limit if distance == distance else float("inf")


def small_errors(candidate: Implementation, shape: Shape, device: torch.device) -> Errors:
    """Errors at small sizes with the heads, widths and slots of `shape`; found once for all shapes that share them."""
    lengths = ((33, 1, 70), (64,)) if shape.lengths else ()
    sizes = [replace(shape, name="small", B=1, T=sum(n), lengths=n) for n in lengths]
    sizes = sizes or [replace(shape, name="small", B=SMALL_BATCH, T=T) for T in SMALL_LENGTHS]
    if candidate.own:
        sizes.append(GROUPED)
    return _small_errors(candidate, tuple(sizes), device)


@cache
def _small_errors(candidate: Implementation, sizes: tuple[Shape, ...], device: torch.device) -> Errors:
    errors = Errors({})
    for shape in sizes:
        x = candidate.inputs(shape, device)
        errors = errors.worst(_results_errors(candidate, candidate.definition, x, shape))
        if isinstance(candidate, Ours):
            errors = errors.worst(_state_errors(candidate, x, shape, "reference"))
    return errors


def full_size_errors(candidate: Implementation, shape: Shape, device: torch.device, gradients: bool) -> Errors:
    """Errors at `shape` itself: of o, for this package the final states, and of the `gradients` if wanted (for packed
    sequences always); none for what is no gated slot attention."""
    if not candidate.gated_slots:
        return Errors({})
    x = candidate.inputs(shape, device)
    if gradients or shape.lengths:
        errors = _results_errors(candidate, candidate.by_products, x, shape)
        return errors.worst(_state_errors(candidate, x, shape, "chunk")) if isinstance(candidate, Ours) else errors
    with torch.no_grad():
        if isinstance(candidate, Ours):
            o, state = candidate.with_state(x, shape, final=True)
        else:
            o, state = candidate.forward(x, shape), None
        squares = torch.zeros(3, dtype=torch.float64, device=device)
        dtypes = (torch.float64, torch.float32)
        for got, *both in zip(o.split(PIECE, 1), *(_pieces(x, shape, dtype) for dtype in dtypes), strict=True):
            (want, exact), (near, plain) = both
            parts = (want, got.double() - want, near.to(got.dtype).double() - want)
            squares += torch.stack([part.square().sum() for part in parts])
        norm, distance, usual = squares.sqrt().tolist()
        errors = Errors({"o": (distance / norm, _limit(usual / norm, o.dtype, _times(candidate)))})
        # The states of the last piece are those of the whole.
        return errors if state is None else errors.worst(compare(_states(state), _states(exact), _states(plain)))


def compare(results: Tensors, exact: Tensors, plain: Tensors, times: float = TIMES, units: float = 1) -> Errors:
    """`results` against the definition in float64 (`exact`), judged by that in an ordinary precision (`plain`).

    The output comes first among the results; gradients are named "d…". Allowed are `times` the distance of `plain` and
    `units` halves of a unit in the last place.
    """
    found, first = {}, next(iter(results.values()))
    for name, want in exact.items():
        norm, got = float(want.norm()) or 1.0, results[name]
        distance = float((got.double() - want).norm()) / norm
        usual = float((plain[name].to(got.dtype).double() - want).norm()) / norm
        # Gates are float32 beside 16-bit inputs, but their gradients come of products in the inputs' format.
        judged = (got, first) if name.startswith("d") else (got,)
        found[name] = (distance, max(_limit(usual, y.dtype, times, units) for y in judged))
    return Errors(found)


def with_gradients(function: Callable[[Tensors], Tensor], x: Tensors, do: Tensor) -> Tensors:
    """{"o": …, "dq": …, …}: o and the gradients of every input, given that of o."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    o = function(leaves)
    gradients = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def gradient_of_o(x: Tensors, shape: Shape) -> Tensor:
    """A random gradient of o, in x's format."""
    q = x["q"]
    random = torch.Generator(q.device).manual_seed(1)
    width = shape.HQ * shape.V // q.shape[2]
    return torch.randn(*q.shape[:3], width, generator=random, device=q.device).to(q.dtype)


def in_precision(x: Tensors, dtype: torch.dtype) -> Tensors:
    """The same numbers in another format."""
    return {name: y.to(dtype) for name, y in x.items()}


def _limit(usual: float, dtype: torch.dtype, times: float, units: float = 1) -> float:
    return times * usual + units * torch.finfo(dtype).eps / 2 + SUMS


def _times(candidate: Implementation) -> float:
    return TIMES if candidate.own else TIMES_OTHERS


def _results_errors(candidate: Implementation, define: Callable[..., Tensor], x: Tensors, shape: Shape) -> Errors:
    do = gradient_of_o(x, shape)
    exact = with_gradients(lambda y: define(y, shape), in_precision(x, torch.float64), do)
    near, dtype = in_precision(x, torch.float32), x["q"].dtype
    if dtype == torch.float32:
        plain = with_gradients(lambda y: define(y, shape), near, do)
    else:
        if define != candidate.by_products:
            # What is a backend, too, is believed only as far as it agrees with the recurrence.
            with torch.no_grad():
                o = candidate.by_products(in_precision(x, torch.float64), shape)
            assert float((o - exact["o"]).norm()) <= AGREE * float(exact["o"].norm()), "the chunkwise form is wrong"
        with rounded_products(dtype):
            plain = with_gradients(lambda y: candidate.by_products(y, shape), near, do)
    return compare(with_gradients(lambda y: candidate.forward(y, shape), x, do), exact, plain, _times(candidate))


def _state_errors(candidate: Ours, x: Tensors, shape: Shape, backend: str) -> Errors:
    """Of the final states, which are float32 always, given the definition's `backend`."""
    dtype = x["k"].dtype
    with torch.no_grad():
        got = candidate.with_state(x, shape, final=True)[1]
        exact = recurrence(in_precision(x, torch.float64), shape, final=True, backend=backend)[1]
        near = in_precision(x, torch.float32)
        if dtype == torch.float32:
            plain = recurrence(near, shape, final=True, backend=backend)[1]
        else:
            with rounded_products(dtype):
                plain = recurrence(near, shape, final=True, backend="chunk")[1]
    return compare(_states(got), _states(exact), _states(plain))


def _states(pair: Any) -> Tensors:
    return dict(zip(("hk", "hv"), pair, strict=True))


def _pieces(x: Tensors, shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Tensor, Any]]:
    """o and the states in pieces of PIECE tokens, these handed on: memory does not grow with the length."""
    state, plain = None, dtype == torch.float32
    for start in range(0, shape.T, PIECE):
        part = {name: y[:, start : start + PIECE].to(dtype) for name, y in x.items()}
        with rounded_products(x["q"].dtype) if plain else nullcontext():
            o, state = recurrence(part, shape, final=True, backend="chunk", initial_state=state)
        yield o, state
