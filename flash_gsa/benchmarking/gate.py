"""Values first: nothing is timed before it has been compared with its definition in float64.

At small sizes (an odd length, two chunks and a tail; for this package also grouped queries with an odd number of slots)
o, the final state and the gradients are compared with the recurrence. At the size that is timed they are compared with
the chunkwise form in float64, which is a backend of its own: a kernel may take another path for long sequences.

The distance is ‖x - exact‖ / ‖exact‖. Allowed is twice that of the definition in float32 rounded to x's format, and
`UNITS` roundings of that format. This finds wrong code; how accurate a backend is, the tests say. With fewer roundings
FLA 0.6.0 would not be timed: its dg is off by 3.5 % at a small size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .implementations import Implementation, Ours, Tensors, recurrence
from .shapes import Shape

UNITS = 12
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
            errors = errors.worst(_state_errors(candidate, x, shape))
    return errors


def full_size_errors(candidate: Implementation, shape: Shape, device: torch.device, gradients: bool) -> Errors:
    """Errors of o, and of the `gradients` if wanted, at `shape` itself; none for what is no gated slot attention."""
    if not candidate.gated_slots:
        return Errors({})
    x = candidate.inputs(shape, device)
    if gradients or shape.lengths:
        return _results_errors(candidate, lambda y, shape: recurrence(y, shape, backend="chunk")[0], x, shape)
    with torch.no_grad():
        o = candidate.forward(x, shape)
        squares = torch.zeros(3, dtype=torch.float64, device=device)
        pieces = zip(_pieces(x, shape, torch.float64), _pieces(x, shape, torch.float32), o.split(PIECE, 1), strict=True)
        for want, near, got in pieces:
            parts = (want, got.double() - want, near.to(got.dtype).double() - want)
            squares += torch.stack([part.square().sum() for part in parts])
    norm, distance, usual = squares.sqrt().tolist()
    return Errors({"o": (distance / norm, _limit(usual / norm, o))})


def compare(results: Tensors, exact: Tensors, plain: Tensors) -> Errors:
    """`results` against the definition in float64 (`exact`), judged by that in an ordinary precision (`plain`).

    The output comes first among the results; gradients are named "d…".
    """
    found, first = {}, next(iter(results.values()))
    for name, want in exact.items():
        norm, got = float(want.norm()) or 1.0, results[name]
        distance = float((got.double() - want).norm()) / norm
        usual = float((plain[name].to(got.dtype).double() - want).norm()) / norm
        # Gates are float32 beside 16-bit inputs, but their gradients come of products in the inputs' format.
        judged = (got, first) if name.startswith("d") else (got,)
        found[name] = (distance, max(_limit(usual, y) for y in judged))
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


def _limit(usual: float, got: Tensor) -> float:
    return 2 * usual + UNITS * torch.finfo(got.dtype).eps / 2


def _results_errors(candidate: Implementation, define: Callable[..., Tensor], x: Tensors, shape: Shape) -> Errors:
    do = gradient_of_o(x, shape)
    exact, plain = (
        with_gradients(lambda y: define(y, shape), in_precision(x, dtype), do)
        for dtype in (torch.float64, torch.float32)
    )
    return compare(with_gradients(lambda y: candidate.forward(y, shape), x, do), exact, plain)


def _state_errors(candidate: Ours, x: Tensors, shape: Shape) -> Errors:
    def states(pair: Any) -> Tensors:
        return dict(zip(("hk", "hv"), pair[1], strict=True))

    with torch.no_grad():
        exact, plain = (
            states(recurrence(in_precision(x, dtype), shape, final=True)) for dtype in (torch.float64, torch.float32)
        )
        # States are float32 always; they are judged as what they are made of, products of x's format.
        got = in_precision(states(candidate.with_state(x, shape, final=True)), x["k"].dtype)
    return compare(got, exact, plain)


def _pieces(x: Tensors, shape: Shape, dtype: torch.dtype) -> Iterator[Tensor]:
    """o in pieces of PIECE tokens, the state handed on: memory does not grow with the length."""
    state = None
    for start in range(0, shape.T, PIECE):
        part = {name: y[:, start : start + PIECE].to(dtype) for name, y in x.items()}
        o, state = recurrence(part, shape, final=True, backend="chunk", initial_state=state)
        yield o
