"""What token mixers do along time: the only places where a token's result depends on other tokens.

Mixers and convolutions reach all of it through their attribute `sequences`. Another object in its place computes the
same where a process has a part of every sequence only: see `flash_gsa.parallel`.
"""

from typing import Any

from torch import Tensor

from ..ops import abc_gates, gated_linear_attention, gated_slot_attention


class WholeSequences:
    """Along time, for a process that has whole sequences, or gets them piece by piece with a cache between."""

    def gated_slot_attention(self, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        """The operator: see `flash_gsa.ops`."""
        return gated_slot_attention(*inputs, **options)  # type: ignore[arg-type]

    def gated_linear_attention(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """The operator: see `flash_gsa.ops`."""
        return gated_linear_attention(*inputs, **options)

    def abc_gates(self, logits: Tensor, normalizer: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
        """ABC's gates, and the normalizer after all tokens: see `flash_gsa.ops`."""
        return abc_gates(logits, initial_normalizer=normalizer, output_final_normalizer=True, cu_seqlens=cu_seqlens)

    def before(self, x: Tensor, tokens: int) -> Tensor:
        """The `tokens` inputs before the first of x [B, T, D]: [B, tokens, D], zeros before a sequence begins."""
        return x.new_zeros(x.shape[0], tokens, x.shape[2])

    def first(self, length: int) -> int:
        """How many tokens come before the first of these `length` ones."""
        return 0
