"""One sequence, or one model, on several devices."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .abc import context_parallel_abc_gates
    from .batches import stretch
    from .context import context_parallel_gated_linear_attention, context_parallel_gated_slot_attention
    from .model import ContextParallel, apply_context_parallel

# The operators come without transformers, which takes seconds to import.
_HOME = {
    "ContextParallel": "model",
    "apply_context_parallel": "model",
    "context_parallel_abc_gates": "abc",
    "context_parallel_gated_linear_attention": "context",
    "context_parallel_gated_slot_attention": "context",
    "stretch": "batches",
}
__all__ = [
    "ContextParallel",
    "apply_context_parallel",
    "context_parallel_abc_gates",
    "context_parallel_gated_linear_attention",
    "context_parallel_gated_slot_attention",
    "stretch",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
