"""The operators: gated slot attention (ABC as gates of it) and gated linear attention, of sequences and one token."""

from .api import (
    gated_linear_attention,
    gated_linear_attention_step,
    gated_slot_attention,
    gated_slot_attention_step,
)
from .gates import abc_gates, abc_gates_step
from .registry import Backend, Problem, backend_names, explain, register_backend

__all__ = [
    "Backend",
    "Problem",
    "abc_gates",
    "abc_gates_step",
    "backend_names",
    "explain",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_slot_attention",
    "gated_slot_attention_step",
    "register_backend",
]
