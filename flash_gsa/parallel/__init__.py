"""One sequence, or one model, on several devices."""

from .context import context_parallel_gated_slot_attention

__all__ = ["context_parallel_gated_slot_attention"]
