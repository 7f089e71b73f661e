"""Token mixers: modules `mixer(x, *, attention_mask, cu_seqlens, cache) -> y`, x and y [B, T, d].

`MIXERS` maps the value of a configuration's `token_mixer` to a function `(config, layer_idx) -> module`. A
new mixer is a module in this folder and its line here.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .attention import SoftmaxAttention
from .convolution import ShortConvolution
from .gated_slot_attention import GatedSlotAttention
from .norm import RMSNorm


def _gsa(config: Any, layer_idx: int) -> nn.Module:
    return GatedSlotAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_slots=config.num_slots,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        feature_map=config.feature_map,
        value_activation=config.value_activation,
        output_activation=config.output_activation,
        gating=config.gating,
        gate_source=config.gate_source,
        gate_logit_normalizer=config.gate_logit_normalizer,
        use_short_conv=config.use_short_conv,
        conv_size=config.conv_size,
        use_norm=config.use_norm,
        elementwise_affine=config.elementwise_affine,
        norm_eps=config.norm_eps,
        layer_idx=layer_idx,
    )


def _attention(config: Any, layer_idx: int) -> nn.Module:
    options = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads} | (config.attn or {})
    options.pop("layers", None)
    return SoftmaxAttention(hidden_size=config.hidden_size, layer_idx=layer_idx, **options)


MIXERS: dict[str, Callable[[Any, int], nn.Module]] = {"gsa": _gsa, "attention": _attention}

__all__ = ["MIXERS", "GatedSlotAttention", "RMSNorm", "ShortConvolution", "SoftmaxAttention"]
