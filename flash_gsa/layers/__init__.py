"""Token mixers: modules `mixer(x, *, attention_mask, cu_seqlens, cache) -> y`, x and y [B, T, d].

`MIXERS` maps the value of a configuration's `token_mixer` to a function `(config, layer_idx) -> module`, and
`PUBLISHED` to the settings of its published 1.3B model, taken where the configuration leaves them open. A new
mixer is a module in this folder and its lines here.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .attention import SoftmaxAttention
from .convolution import ShortConvolution
from .gated_linear_attention import GatedLinearAttention
from .gated_slot_attention import GatedSlotAttention
from .hgrn2 import HGRN2
from .norm import RMSNorm
from .retnet import MultiScaleRetention

# What all recurrent mixers take.
_SIZES = ("hidden_size", "num_heads", "num_kv_heads", "expand_k", "expand_v")
_RECURRENT = (*_SIZES, "feature_map", "use_short_conv", "conv_size", "elementwise_affine", "norm_eps")


def _from(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _gsa(config: Any, layer_idx: int) -> nn.Module:
    own = ("num_slots", "value_activation", "output_activation", "gating", "gate_source", "gate_logit_normalizer")
    return GatedSlotAttention(**_from(config, *_RECURRENT, *own, "use_norm", "states"), layer_idx=layer_idx)


def _gla(config: Any, layer_idx: int) -> nn.Module:
    own = ("gate_logit_normalizer", "gate_low_rank_dim")
    return GatedLinearAttention(**_from(config, *_RECURRENT, *own), layer_idx=layer_idx)


def _hgrn2(config: Any, layer_idx: int) -> nn.Module:
    return HGRN2(**_from(config, *_RECURRENT), layer_idx=layer_idx)


def _retnet(config: Any, layer_idx: int) -> nn.Module:
    return MultiScaleRetention(**_from(config, *_RECURRENT), layer_idx=layer_idx)


def _attention(config: Any, layer_idx: int) -> nn.Module:
    options = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads} | (config.attn or {})
    options.pop("layers", None)
    return SoftmaxAttention(hidden_size=config.hidden_size, layer_idx=layer_idx, **options)


MIXERS: dict[str, Callable[[Any, int], nn.Module]] = {
    "gsa": _gsa,
    "gla": _gla,
    "hgrn2": _hgrn2,
    "retnet": _retnet,
    "attention": _attention,
}

_OF_GSA = {
    "num_heads": 4,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "feature_map": "swish",
    "gate_logit_normalizer": 8.0,
    "hidden_ratio": 4,
}
# At hidden size 2048: the papers' heads (GLA: 4; HGRN2: 128 wide; RetNet: keys 256 wide), widths and dampings, which
# are also the defaults of the flash-linear-attention package; softmax attention with the usual 128 numbers a head.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gsa": _OF_GSA,
    "gla": _OF_GSA | {"expand_k": 0.5, "feature_map": "identity", "gate_logit_normalizer": 16.0},
    "hgrn2": _OF_GSA | {"num_heads": 16},
    "retnet": _OF_GSA | {"num_heads": 8, "expand_v": 2.0, "feature_map": "identity", "hidden_ratio": 2},
    "attention": _OF_GSA | {"num_heads": 16},
}

__all__ = [
    "HGRN2",
    "MIXERS",
    "PUBLISHED",
    "GatedLinearAttention",
    "GatedSlotAttention",
    "MultiScaleRetention",
    "RMSNorm",
    "ShortConvolution",
    "SoftmaxAttention",
]
