"""Backends of the operator: what one is, which there are, which one is chosen and why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError, did_you_mean

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a backend must know to say whether it can run: sizes, number format, place.

    B, T: batch and time (packed input has B = 1); HQ, H: query and key/value heads; K, V: head
    dimensions of keys and values; M: slots; dtype: of q, k, v; device: "cpu", "cuda", …
    """

    B: int
    T: int
    HQ: int
    H: int
    K: int
    V: int
    M: int
    dtype: torch.dtype
    device: str
    packed: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    `forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens) -> (o, state | None)`
    gets arguments that `validation.check_sequence` has accepted; `s` may be None, meaning 1 − e^g.
    `step(q, k, v, g, s, state, scale) -> (o, state)` is one token; None: the reference step is used.
    `unsupported(problem)` is None if the backend can run it, else the reason why not.
    `priority`: "auto" takes the runnable backend with the highest.
    """

    name: str
    forward: Callable[..., tuple[Tensor, State | None]]
    unsupported: Callable[[Problem], str | None]
    priority: int
    step: Callable[..., tuple[Tensor, State]] | None = None


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make `backend` selectable by name and by "auto"."""
    _backends[backend.name] = backend


def backend_names() -> list[str]:
    """Registered names, the first choice of "auto" first."""
    return [b.name for b in _by_priority()]


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """For each backend, best first: (name, None if it can run `problem`, else the reason why not)."""
    return [(b.name, b.unsupported(problem)) for b in _by_priority()]


def select(name: str, problem: Problem) -> Backend:
    """The backend called `name`, or for "auto" the first that can run `problem`.

    Raises:
        UsageError: unknown name, or the named backend cannot run the problem (with its reason and
            the backends that can).
    """
    if name == "auto":
        for backend in _by_priority():
            if backend.unsupported(problem) is None:
                return backend
        reasons = "; ".join(f"{n}: {why}" for n, why in explain(problem))
        raise UsageError(f"no backend can run this problem ({reasons})")
    if name not in _backends:
        raise UsageError(
            f"backend {name!r} does not exist; choose 'auto' or one of {', '.join(backend_names())}."
            + did_you_mean(name, ["auto", *_backends])
        )
    backend = _backends[name]
    if (reason := backend.unsupported(problem)) is not None:
        able = [n for n, why in explain(problem) if why is None]
        raise UsageError(f"backend {name!r} cannot run this: {reason}. These can: {', '.join(able)}")
    return backend


def _by_priority() -> list[Backend]:
    return sorted(_backends.values(), key=lambda b: -b.priority)
