"""What the token mixers on gated linear attention share: sizes, convolutions, padding, the state in the cache."""

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError, did_you_mean
from ..ops import gated_linear_attention_step
from .convolution import ShortConvolution
from .feature_maps import FEATURE_MAPS
from .linears import projections
from .norm import RMSNorm
from .sequences import WholeSequences


class GatedRMSNorm(RMSNorm):
    """y = RMSNorm(x) ∘ SiLU(z) over the last dimension: x, z [..., D] → [..., D]; the weight is [D]."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * F.silu(z)


class LinearAttentionMixer(nn.Module):
    """y = output(GLA(project(x)), x): the frame of `GatedLinearAttention`, `HGRN2` and `MultiScaleRetention`.

    A subclass makes the projections in its constructor and has two methods; the operator's scale is K^{-1/2}.

        project(x, *, attention_mask, cu_seqlens, past, carry) -> q, k, v, g
            The operator's inputs for x [B, T, d], the gates in float32 at least (then float64 beside float64). For
            padding k = 0 and g = 0, which neither writes nor forgets. `past` is this layer's cache entry; what the
            next piece needs is put into `carry`.
        output(o, x) -> y
            y [B, T, d] from the operator's o [B, T, HQ, V] and the mixer's input.

    Args:
        hidden_size: d, width of x and y.
        num_heads: query heads HQ.
        num_kv_heads: key/value heads H, a divisor of HQ; None: HQ.
        expand_k, expand_v: width of all query heads together (HQ·K), and of all value heads (HQ·V), in units of d.
        feature_map: φ: "identity", "swish", "relu" or "softmax" (over the head dimension).
        use_short_conv: whether there are causal depthwise convolutions of `conv_size` after the projections.
        layer_idx: place of this layer's entry in a cache: `state` [N, H, K, V] and what a subclass adds.

    Raises:
        UsageError: sizes that do not divide, unknown names.
    """

    project: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    output: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        expand_k: float,
        expand_v: float,
        feature_map: str,
        use_short_conv: bool,
        conv_size: int,
        layer_idx: int,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        self.key_dim, self.value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        for name, width in (("expand_k", self.key_dim), ("expand_v", self.value_dim)):
            if width < 1 or width % num_heads:
                raise UsageError(
                    f"hidden_size · {name} = {width} must be a positive multiple of num_heads = {num_heads}"
                )
        if feature_map not in FEATURE_MAPS:
            raise UsageError(
                f"feature_map={feature_map!r} is not known; choose one of {', '.join(FEATURE_MAPS)}."
                + did_you_mean(str(feature_map), FEATURE_MAPS)
            )
        if use_short_conv and conv_size < 2:
            raise UsageError(f"conv_size must be at least 2, got {conv_size}; use_short_conv=False turns it off")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        self.kv_key_dim, self.kv_value_dim = num_kv_heads * self.head_k_dim, num_kv_heads * self.head_v_dim
        self.feature_map = FEATURE_MAPS[feature_map]
        self.use_short_conv, self.layer_idx = use_short_conv, layer_idx
        self.sequences = WholeSequences()

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, state={self.head_k_dim}×{self.head_v_dim}"

    def mixing_flops(self, length: int) -> float:
        """FLOPs a token of the operator: see `flash_gsa.models.flops`."""
        return 2 * self.head_k_dim * self.head_v_dim * (self.num_kv_heads + self.num_heads)

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: MutableMapping[int, dict[str, Any]] | None = None,
        **options: Tensor | None,
    ) -> Tensor:
        """Mix over time: x [B, T, d] → [B, T, d].

        Args:
            attention_mask: [B, T], 1 for a token, 0 for padding, which leaves the state as it is.
            cu_seqlens: [S+1] boundaries of packed sequences (B = 1).
            cache: carries the state from piece to piece; this layer's entry is read and replaced.
            options: what else the mixer's `project` takes.

        Raises:
            UsageError: a cache with packed sequences and short convolutions.
        """
        if cache is not None and cu_seqlens is not None and self.use_short_conv:
            raise UsageError(
                "a layer with short convolutions cannot carry a cache over packed sequences; "
                "run them one at a time or as a padded batch"
            )
        past = None if cache is None else cache.get(self.layer_idx)
        carry: dict[str, Any] = {}
        q, k, v, g = self.project(
            x, attention_mask=attention_mask, cu_seqlens=cu_seqlens, past=past, carry=carry, **options
        )
        state, scale = None if past is None else past["state"], self.head_k_dim**-0.5
        if x.shape[1] == 1 and state is not None and cu_seqlens is None:
            o, state = gated_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state=state, scale=scale)
            o = o[:, None]
        else:
            o, state = self.sequences.gated_linear_attention(
                q,
                k,
                v,
                g,
                scale=scale,
                initial_state=state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
            )
        if cache is not None:
            cache[self.layer_idx] = carry | {"state": state}
        return self.output(o, x)

    def _projected(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """x through each `<name>_proj`."""
        maps = (getattr(self, f"{name}_proj") for name in names)
        return dict(zip(names, projections(x, *maps), strict=True))

    def _convolved(
        self, inputs: dict[str, Tensor], attention_mask, cu_seqlens, past, carry: dict[str, Any] | None
    ) -> list[Tensor]:
        """Each named projection [B, T, D] through its convolution `<name>_conv1d`, if the mixer has convolutions."""
        if not self.use_short_conv:
            return list(inputs.values())
        tails = (None,) * len(inputs) if past is None else past["conv"]
        outputs, new_tails = [], []
        for (name, projected), tail in zip(inputs.items(), tails, strict=True):
            convolution: ShortConvolution = getattr(self, f"{name}_conv1d")
            y, new_tail = convolution(projected, tail=tail, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
            outputs.append(y)
            new_tails.append(new_tail)
        if carry is not None:
            carry["conv"] = tuple(new_tails)
        return outputs

    def _queries(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_k_dim))

    def _keys(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_kv_heads, self.head_k_dim))

    def _values(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_kv_heads, self.head_v_dim))


def widened(x: Tensor) -> Tensor:
    """x in float32, in which gates are computed; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def without_padding(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """x [B, T, …] with zeros where attention_mask [B, T] has padding."""
    if attention_mask is None:
        return x
    padding = ~attention_mask.bool()
    return x.masked_fill(padding.view(*padding.shape, *(1,) * (x.dim() - 2)), 0.0)
