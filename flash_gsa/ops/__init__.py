"""The operator: gated slot attention over sequences, one token at a time, and ABC as gates of it."""

from .api import gated_slot_attention, gated_slot_attention_step
from .gates import abc_gates, abc_gates_step
from .registry import Backend, Problem, backend_names, explain, register_backend

__all__ = [
    "Backend",
    "Problem",
    "abc_gates",
    "abc_gates_step",
    "backend_names",
    "explain",
    "gated_slot_attention",
    "gated_slot_attention_step",
    "register_backend",
]
