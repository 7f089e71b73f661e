"""`GSAConfig`: every choice of a GSA language model, and nothing that does nothing."""

import inspect
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

from ..errors import UsageError, did_you_mean
from ..layers import MIXERS, PUBLISHED

logger = logging.get_logger(__name__)

# Keys in published configurations that are spelt differently, and keys that carry no meaning for the model's
# function: they choose kernels or are ignored by the package that wrote them.
_RENAMED = {"exapnd_k": "expand_k", "exapnd_v": "expand_v"}
_MEANINGLESS = {
    "clamp_min",
    "clamp_max",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "max_position_embeddings",
    "use_l2warp",
    "use_output_gate",
}
# Settings whose default depends on the token mixer.
_OPEN = ("num_heads", "expand_k", "expand_v", "feature_map", "gate_logit_normalizer")
_ATTENTION_KEYS = ("layers", "num_heads", "num_kv_heads", "window_size", "rope_theta", "qkv_bias")


class GSAConfig(PretrainedConfig):
    """Configuration of `GSAModel` and `GSAForCausalLM` (model_type "gsa").

    Defaults are those of the token mixer's published 1.3B model; where they differ between mixers, the setting is None
    in the signature, and `flash_gsa.layers.PUBLISHED` has the numbers.

    Args:
        vocab_size: number of token ids.
        hidden_size: d, width of the residual stream.
        num_hidden_layers: blocks.
        intermediate_size: width of the SwiGLU MLP; None: 2/3·hidden_ratio·d rounded up to a multiple of 256.
        hidden_ratio: see intermediate_size; excluded by it. None: 4, or for "retnet", whose mixer is wider, 2.
        token_mixer: what mixes tokens in every block: "gsa", "gla", "hgrn2", "retnet", or "attention" (softmax). Each
            reads the settings of its own layer among those below and leaves the others alone, so that a configuration
            is moved to another mixer by this one value.
        num_heads, num_kv_heads: of every mixer.
        expand_k, expand_v, feature_map, use_short_conv, conv_size, elementwise_affine: of the recurrent ones, see
            `flash_gsa.layers.GatedSlotAttention`, `GatedLinearAttention`, `HGRN2`, `MultiScaleRetention` there.
        gate_logit_normalizer: of "gsa" and "gla". gate_low_rank_dim: of "gla".
        num_slots, value_activation, output_activation, gating, gate_source, use_norm, states: of "gsa".
        attn: hybrid layers, softmax attention at the depths `layers`: a dictionary with `layers` (list of block
            indices; not given when token_mixer is "attention") and, optionally, `num_heads`, `num_kv_heads`,
            `window_size`, `rope_theta`, `qkv_bias`, see `flash_gsa.layers.SoftmaxAttention`.
        norm_eps: ε of every RMSNorm.
        initializer_range: standard deviation of initial weights.
        use_cache: whether a forward pass outside training returns a cache.
        tie_word_embeddings: one matrix for input embeddings and output logits.
        bos_token_id, eos_token_id, pad_token_id: ids, or None.

    Raises:
        UsageError: an unknown key (naming the nearest right one) or settings that exclude each other.
    """

    model_type = "gsa"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers reads it as a plain list)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        intermediate_size: int | None = None,
        hidden_ratio: float | None = None,
        token_mixer: str = "gsa",
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        num_slots: int = 64,
        expand_k: float | None = None,
        expand_v: float | None = None,
        feature_map: str | None = None,
        value_activation: str = "swish",
        output_activation: str = "swish",
        gating: str = "gsa",
        gate_source: str = "f_proj",
        gate_logit_normalizer: float | None = None,
        gate_low_rank_dim: int = 16,
        use_short_conv: bool = False,
        conv_size: int = 4,
        use_norm: bool = True,
        states: str = "keep",
        elementwise_affine: bool = True,
        attn: dict[str, Any] | None = None,
        hidden_act: str = "swish",
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        settings = dict(locals())
        own = [n for n in inspect.signature(GSAConfig.__init__).parameters if n not in ("self", "kwargs")]
        for wrong, right in _RENAMED.items():
            if wrong in kwargs:
                settings[right] = kwargs.pop(wrong)
        _check_mixer(token_mixer, kwargs)
        dropped = sorted(_MEANINGLESS & kwargs.keys())
        for name in dropped:
            kwargs.pop(name)
        if dropped:
            logger.info("GSAConfig: not used and dropped: %s", ", ".join(dropped))
        if kwargs.get("attnres_block_size", 0) is None:
            kwargs.pop("attnres_block_size")
        base = _base_keys()
        for name in kwargs:
            if name not in base and not name.startswith("_"):
                raise UsageError(
                    f"GSAConfig has no setting {name!r}.{did_you_mean(name, own)} Settings: {', '.join(own)}"
                )

        for name in _OPEN:
            if settings[name] is None:
                settings[name] = PUBLISHED[token_mixer][name]
        _check(settings)
        settings["hidden_act"] = "swish"
        if intermediate_size is None:
            ratio = PUBLISHED[token_mixer]["hidden_ratio"] if hidden_ratio is None else hidden_ratio
            intermediate_size = 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)
        settings |= {"intermediate_size": intermediate_size, "hidden_ratio": None}
        special = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        for name in own:
            if name not in special:
                setattr(self, name, settings[name])
        super().__init__(**{name: settings[name] for name in special}, **kwargs)

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the blocks that mix tokens by softmax attention."""
        if self.token_mixer == "attention":
            return list(range(self.num_hidden_layers))
        return sorted((self.attn or {}).get("layers", []))

    def mixer_of(self, layer_idx: int) -> str:
        """Name of block `layer_idx`'s token mixer (a key of `flash_gsa.layers.MIXERS`)."""
        return "attention" if layer_idx in self.attention_layers else self.token_mixer


def _base_keys() -> set[str]:
    """Keys that any Hugging Face configuration may carry, in this version of transformers."""
    return (
        set(PretrainedConfig().to_dict())
        | set(inspect.signature(PretrainedConfig.__init__).parameters)
        | {
            "attn_implementation",
            "auto_map",
            "dtype",
            "model_type",
            "name_or_path",
            "num_labels",
            "output_attentions",
            "torch_dtype",
            "transformers_version",
        }
    )


def _check_mixer(name: Any, dropped: dict[str, Any]) -> None:
    if not isinstance(name, str) or name not in MIXERS:
        raise UsageError(
            f"token_mixer={name!r} is not known; choose one of {', '.join(MIXERS)}." + did_you_mean(str(name), MIXERS)
        )
    if name in ("gla", "retnet") and not dropped.get("use_output_gate", True):
        raise UsageError(f"use_output_gate=False: the output gate is part of token_mixer={name!r}; leave it out")
    if name == "gla" and dropped.get("clamp_min") is not None:
        raise UsageError(f"clamp_min={dropped['clamp_min']}: gates need no clamping here; leave it out")


def _check(c: dict[str, Any]) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "num_slots", "gate_low_rank_dim"):
        if isinstance(c[name], bool) or not isinstance(c[name], int) or c[name] < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {c[name]!r}")
    for name in ("num_kv_heads", "intermediate_size"):
        if c[name] is not None and (isinstance(c[name], bool) or not isinstance(c[name], int) or c[name] < 1):
            raise UsageError(f"{name} must be a whole number of at least 1, or left out, got {c[name]!r}")
    if isinstance(c["conv_size"], bool) or not isinstance(c["conv_size"], int) or c["conv_size"] < 2:
        raise UsageError(f"conv_size must be a whole number of at least 2, got {c['conv_size']!r}")
    ratio = c["hidden_ratio"]
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio > 0):
        raise UsageError(f"hidden_ratio must be a number above 0, or left out, got {ratio!r}")
    for name in ("use_short_conv", "use_norm", "elementwise_affine", "use_cache", "tie_word_embeddings"):
        if not isinstance(c[name], bool):
            raise UsageError(f"{name} must be true or false, got {c[name]!r}")
    for name in ("expand_k", "expand_v", "gate_logit_normalizer", "norm_eps", "initializer_range"):
        if isinstance(c[name], bool) or not isinstance(c[name], (int, float)) or not c[name] > 0:
            raise UsageError(f"{name} must be a number above 0, got {c[name]!r}")
    if c["intermediate_size"] is not None and c["hidden_ratio"] is not None:
        # Published configurations carry both; the explicit size decides, the ratio must not contradict it.
        implied = 256 * -(-int(c["hidden_size"] * c["hidden_ratio"] * 2 / 3) // 256)
        if implied != c["intermediate_size"]:
            raise UsageError(
                f"intermediate_size = {c['intermediate_size']} and hidden_ratio = {c['hidden_ratio']} "
                f"(which would make it {implied}) contradict each other; give one of them"
            )
    if c["hidden_act"] not in ("swish", "silu"):
        raise UsageError(f"hidden_act must be 'swish' (the MLP is a SwiGLU), got {c['hidden_act']!r}")
    attn = c["attn"]
    if attn is None:
        return
    if not isinstance(attn, dict):
        raise UsageError(f"attn must be a dictionary with {', '.join(_ATTENTION_KEYS)}, got {attn!r}")
    for name in attn:
        if name not in _ATTENTION_KEYS:
            raise UsageError(
                f"attn has no setting {name!r}.{did_you_mean(name, _ATTENTION_KEYS)} "
                f"Settings: {', '.join(_ATTENTION_KEYS)}"
            )
    layers = attn.get("layers")
    if c["token_mixer"] == "attention":
        if layers is not None:
            raise UsageError("token_mixer='attention' makes every layer attention; leave attn.layers out")
        return
    if not isinstance(layers, (list, tuple)) or not layers:
        raise UsageError("attn.layers must list the blocks that use softmax attention, e.g. attn={'layers': [0, 6]}")
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < c["num_hidden_layers"]:
            raise UsageError(f"attn.layers holds {index!r}, but blocks are numbered 0 to {c['num_hidden_layers'] - 1}")
