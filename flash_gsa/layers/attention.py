"""Softmax attention with rotary positions: the layer hybrids mix in, and the baseline."""

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.opaque import TAGS, gradients_of
from .linears import projections
from .rotary import count_tokens, rotate, rotation


class SoftmaxAttention(nn.Module):
    """Causal softmax attention, grouped queries, rotary position embedding, optionally over a window.

        o_t = Σ_{t-W < j ≤ t} softmax_j(⟨R_t q_t, R_j k_j⟩ / √D) v_j

    with R_t the rotation by angles t·θ^{-2i/D} of the pairs (i, i + D/2), t counting the tokens without padding.

    Args:
        hidden_size: d; head dimension D = d / num_heads, which must be even.
        num_heads, num_kv_heads: query heads and key/value heads (None: as many).
        window_size: W, tokens seen, the current one included; None: all. With a window the cache holds at most
            W - 1 tokens.
        rope_theta: θ.
        qkv_bias: bias on the q, k, v projections.
        layer_idx: place of this layer's entry in a cache.

    Raises:
        UsageError: sizes that do not divide.

    Source: Vaswani et al., 2017; rotary positions: Su et al., 2021; grouped queries: Ainslie et al., 2023. Parameter
    names are those of Llama's attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        window_size: int | None = None,
        rope_theta: float = 10000.0,
        qkv_bias: bool = False,
        layer_idx: int = 0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(f"attention: num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        if hidden_size % (2 * num_heads):
            raise UsageError(
                f"attention: hidden_size = {hidden_size} must be a multiple of 2·num_heads = {2 * num_heads} "
                "(rotary positions turn pairs of a head's dimensions)"
            )
        if window_size is not None and window_size < 1:
            raise UsageError(f"attention: window_size must be at least 1, got {window_size}; leave it out for none")
        if not rope_theta > 0:
            raise UsageError(f"attention: rope_theta must be above 0, got {rope_theta}")
        self.num_heads, self.num_kv_heads, self.layer_idx = num_heads, num_kv_heads, layer_idx
        self.head_dim = hidden_size // num_heads
        self.window_size, self.rope_theta = window_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, window={self.window_size}"

    def mixing_flops(self, length: int) -> float:
        """FLOPs a token of scores and sums, on average over `length` tokens: see `flash_gsa.models.flops`."""
        window = length if self.window_size is None else min(self.window_size, length)
        in_sight = (window * (window + 1) / 2 + (length - window) * window) / length
        return 4 * self.num_heads * self.head_dim * in_sight

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: MutableMapping[int, dict[str, Any]] | None = None,
    ) -> Tensor:
        """Mix over time: x [B, T, d] → [B, T, d]; arguments as for `GatedSlotAttention.forward`.

        Raises:
            UsageError: a cache with packed sequences.
        """
        B, T, _ = x.shape
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections(x, self.q_proj, self.k_proj, self.v_proj))

        past = None if cache is None else cache.get(self.layer_idx)
        if cu_seqlens is not None and cache is not None:
            raise UsageError(
                "softmax attention cannot carry a cache over packed sequences; "
                "run them one at a time or as a padded batch"
            )
        position, seen = count_tokens(x, 0 if past is None else past["seen"], attention_mask, cu_seqlens)
        turn = rotation(position, self.head_dim, self.rope_theta)
        q, k = rotate(q, *turn), rotate(k, *turn)

        if cu_seqlens is not None:
            o = attend_packed(q, k, v, cu_seqlens, self.window_size)
        else:
            real = attention_mask.bool() if attention_mask is not None else None
            if past is not None:
                k, v = torch.cat([past["k"], k], dim=1), torch.cat([past["v"], v], dim=1)
                if real is not None or past["real"] is not None:
                    old = past["k"].shape[1]
                    real = torch.cat(
                        [
                            x.new_ones(B, old, dtype=torch.bool) if past["real"] is None else past["real"],
                            x.new_ones(B, T, dtype=torch.bool) if real is None else real,
                        ],
                        dim=1,
                    )
            o = attend(q, k, v, real, self.window_size)
            if cache is not None:
                keep = (
                    slice(None) if self.window_size is None else slice(max(0, k.shape[1] - self.window_size + 1), None)
                )
                cache[self.layer_idx] = {
                    "k": k[:, keep],
                    "v": v[:, keep],
                    "real": None if real is None else real[:, keep],
                    "seen": seen,
                }
        return self.o_proj(o.flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, window: int | None) -> Tensor:
    """Causal softmax attention of the last T of L tokens.

    Args:
        q: [B, T, HQ, D] against k, v [B, L, H, D], whose last T tokens are q's own.
        real: [B, L] True for a token, False for padding; None: all are tokens.
        window: W, or None.

    Returns:
        o [B, T, HQ, D].
    """
    T, L = q.shape[1], k.shape[1]
    mask = None
    # All L keys may be seen by every query only if T = 1; then no mask is needed.
    windowed = window is not None and window < L
    if real is not None or windowed or (T not in (1, L)):
        row = torch.arange(L - T, L, device=q.device)[:, None]
        column = torch.arange(L, device=q.device)[None]
        mask = column <= row
        if window is not None:
            mask = mask & (column > row - window)
        if real is not None:
            mask = mask[None, None] & real[:, None, None]
            # A padded query sees itself, so that its row of the softmax is not empty.
            mask = mask | (column == row)
    causal = mask is None
    if T == 1:  # a branch, because torch.compile's symbolic T > 1 is no bool
        causal = False
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """`attend` for packed sequences [1, T, …] with boundaries cu_seqlens [S+1].

    The lengths are read on the host. torch.compile, which cannot know them, sees one operator, whose backward computes
    the forward again.
    """
    return (_packed_op if torch.compiler.is_compiling() else _by_length)(q, k, v, cu_seqlens, window)


def _by_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Packed sequences as batches padded on the right, which causal rows never look at."""
    lengths = cu_seqlens.to("cpu").diff().tolist()
    q, k, v = (x[0].split(lengths) for x in (q, k, v))
    alike: dict[int, list[int]] = {}
    for n, length in enumerate(lengths):
        if length:
            # One batch for all lengths in (2^{i-1}, 2^i]: one long sequence does not stretch a hundred short ones.
            alike.setdefault((length - 1).bit_length(), []).append(n)
    o = list(q)  # right for empty sequences, replaced for all others
    for batch in alike.values():
        rows = [nn.utils.rnn.pad_sequence([x[n] for n in batch], batch_first=True) for x in (q, k, v)]
        for n, y in zip(batch, attend(rows[0], rows[1], rows[2], None, window), strict=True):
            o[n] = y[: lengths[n]]
    return torch.cat(o)[None]


@torch.library.custom_op("flash_gsa::packed_attention", mutates_args=(), tags=TAGS)
def _packed_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    return _by_length(q, k, v, cu_seqlens, window)


@_packed_op.register_fake
def _(q, k, v, cu_seqlens, window):
    return q.new_empty(q.shape)


@torch.library.custom_op("flash_gsa::packed_attention_backward", mutates_args=(), tags=TAGS)
def _packed_backward_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def run(q, k, v):
        return (_by_length(q, k, v, cu_seqlens, window),)

    return gradients_of(run, q, [k, v], [do])


@_packed_backward_op.register_fake
def _(q, k, v, cu_seqlens, window, do):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do):
    return *_packed_backward_op(*ctx.saved_tensors, ctx.window, do), None, None


_packed_op.register_autograd(_backward, setup_context=_save)
