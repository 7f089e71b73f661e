"""Backends of the operators: what one is, which there are, which one is chosen and why."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError, did_you_mean

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """What a backend must know to say whether it can run: sizes, number format, place.

    B, T: batch and time (packed input has B = 1); HQ, H: query and key/value heads; K, V: head
    dimensions of keys and values; M: slots; dtype: of q, k, v; device: "cpu", "cuda", …
    linear: gated linear attention, in which the key dimension takes the slots' part: M = K.
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
    linear: bool = False


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    `forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens) -> (o, state | None)`
    gets arguments that `validation.check_sequence` has accepted; `s` may be None, meaning 1 − e^g.
    `step(q, k, v, g, s, state, scale, in_place=False) -> (o, state)` is one token; None: the reference step is used.
    `linear_forward(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens) -> (o, state | None)` is gated
    linear attention, g having k's shape; None: the backend has none.
    `linear_step(q, k, v, g, state, scale) -> (o, state)` is one token of it; None: the reference step is used.
    `unsupported(problem)` is None if the backend can run it, else the reason why not. It is not asked about a linear
    problem where `linear_forward` is None.
    `priority`: "auto" takes the runnable backend with the highest.
    `traceable`: torch.compile can trace `forward` and `linear_forward` without a break of its graph.
    `context_forward(q, k, v, g, s, scale, initial_state, output_final_state, recompute, exchange) -> (o, state | None)`
    is `forward` of a stretch of sequences, of which other processes have the others: see `flash_gsa.parallel.context`;
    None: it is put together from `forward`.
    `forward_recomputing`: `forward` that keeps no states for its backward; None: all of `forward` is run again there.
    """

    name: str
    forward: Callable[..., tuple[Tensor, State | None]]
    unsupported: Callable[[Problem], str | None]
    priority: int
    step: Callable[..., tuple[Tensor, State]] | None = None
    linear_forward: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    linear_step: Callable[..., tuple[Tensor, Tensor]] | None = None

    traceable: bool = False
    forward_recomputing: Callable[..., tuple[Tensor, State | None]] | None = None
    context_forward: Callable[..., tuple[Tensor, State | None]] | None = None

    def recomputing_forward(self, *arguments) -> tuple[Tensor, State | None]:
        """`forward` under the policy "recompute" of `gated_slot_attention`."""
        if self.forward_recomputing is not None:
            return self.forward_recomputing(*arguments)
        return checkpoint(self.forward, *arguments, use_reentrant=False)

    def reason_against(self, problem: Problem) -> str | None:
        """None if this backend can run `problem`, else why not."""
        if problem.linear and self.linear_forward is None:
            return "it has no gated linear attention"
        return self.unsupported(problem)


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make `backend` selectable by name and by "auto"."""
    _backends[backend.name] = backend


def named(name: str) -> Backend:
    """The registered backend `name`."""
    return _backends[name]


def backend_names() -> list[str]:
    """Registered names, the first choice of "auto" first."""
    return [b.name for b in _by_priority()]


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """For each backend, best first: (name, None if it can run `problem`, else the reason why not)."""
    return [(b.name, b.reason_against(problem)) for b in _by_priority()]


def select(name: str, problem: Problem) -> Backend:
    """The backend called `name`, or for "auto" the first that can run `problem`.

    Raises:
        UsageError: unknown name, or the named backend cannot run the problem (with its reason and
            the backends that can).
    """
    if name == "auto":
        for backend in _by_priority():
            if backend.reason_against(problem) is None:
                return backend
        reasons = "; ".join(f"{n}: {why}" for n, why in explain(problem))
        raise UsageError(f"no backend can run this problem ({reasons})")
    if not isinstance(name, str):
        raise UsageError(f"backend must be a name, got {name!r}; choose 'auto' or one of {', '.join(backend_names())}")
    if name not in _backends:
        raise UsageError(
            f"backend {name!r} does not exist; choose 'auto' or one of {', '.join(backend_names())}."
            + did_you_mean(name, ["auto", *_backends])
        )
    backend = _backends[name]
    if (reason := backend.reason_against(problem)) is not None:
        able = [n for n, why in explain(problem) if why is None]
        raise UsageError(f"backend {name!r} cannot run this: {reason}. These can: {', '.join(able)}")
    return backend


def _by_priority() -> list[Backend]:
    return sorted(_backends.values(), key=lambda b: -b.priority)
