"""Gated slot attention as a layer: projections, gates, the operator, output norm and projection."""

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError, did_you_mean
from ..ops import abc_gates_step, gated_slot_attention_step
from ..ops.pointwise import log_gates, silu_each
from ..ops.validation import POLICIES
from .convolution import ShortConvolution
from .feature_maps import ACTIVATIONS, FEATURE_MAPS
from .linear_attention import widened
from .linears import normed_projection, projections
from .norm import RMSNorm, SiluRMSNorm
from .sequences import WholeSequences

GATINGS = ("gsa", "data_independent", "abc")
GATE_SOURCES = ("f_proj", "pooled_keys")

# ABC logits of padding: writes nothing beside any real logit, yet finite, so no NaN can come of it.
_NOTHING = -1e30


class GatedSlotAttention(nn.Module):
    """The GSA token mixer.

        q, k, v = φ(W_q x), φ(W_k x), ψ(W_v x)              φ: feature map, ψ: value activation
        g       = logsigmoid(W_f x) / τ                     log forget gate, one per slot and kv head
        y       = W_o RMSNorm(ψ'(GSA(q, k, v, g)))          ψ': output activation; the norm over all heads

    Args:
        hidden_size: d, width of x and y.
        num_heads: query heads HQ.
        num_kv_heads: key/value heads H, a divisor of HQ; None: HQ.
        num_slots: M, slots of memory a key/value head.
        expand_k, expand_v: width of all query heads together (HQ·K), and of all value heads (HQ·V), in units of d.
        feature_map: φ of queries and keys: "swish", "relu", "identity", "softmax" (over the head dimension).
        value_activation, output_activation: ψ, ψ': "swish" or "identity".
        gating: "gsa", gates computed from the input; "data_independent", one learned gate a slot;
            "abc", the ungated mechanism: slot scores normalised over all that was written.
        gate_source: where gate logits come from: "f_proj", a projection of its own; "pooled_keys", the key
            projection averaged to H·M numbers (no weights of its own; as in Liger).
        gate_logit_normalizer: τ > 0, damps the gate: α = σ(f)^{1/τ}. Not used by gating "abc".
        use_short_conv: a causal depthwise convolution of `conv_size` with SiLU on q, k and v before φ and ψ.
        use_norm: the RMSNorm before the output projection; `elementwise_affine`: with a learned weight.
        norm_eps: its ε.
        states: what is left for the backward, "keep" or "recompute": see `flash_gsa.ops.gated_slot_attention`.
        layer_idx: place of this layer's entry in a cache.

    Raises:
        UsageError: sizes that do not divide, unknown names, settings that exclude each other.

    Source: Zhang et al., 2024, §3.2; pooled keys: Lan et al., "Liger: Linearizing Large Language Models to Gated
    Recurrent Structures" (2025). Parameter names are those of published GSA checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int = 64,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "swish",
        value_activation: str = "swish",
        output_activation: str = "swish",
        gating: str = "gsa",
        gate_source: str = "f_proj",
        gate_logit_normalizer: float = 8.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        use_norm: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        states: str = "keep",
        layer_idx: int = 0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        key_dim, value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        for name, value, known in (
            ("feature_map", feature_map, FEATURE_MAPS),
            ("value_activation", value_activation, ACTIVATIONS),
            ("output_activation", output_activation, ACTIVATIONS),
            ("gating", gating, GATINGS),
            ("gate_source", gate_source, GATE_SOURCES),
            ("states", states, POLICIES),
        ):
            if value not in known:
                raise UsageError(
                    f"{name}={value!r} is not known; choose one of {', '.join(known)}."
                    + did_you_mean(str(value), known)
                )
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        for name, dim in (("expand_k", key_dim), ("expand_v", value_dim)):
            if dim < 1 or dim % num_heads:
                raise UsageError(f"hidden_size · {name} = {dim} must be a positive multiple of num_heads = {num_heads}")
        if num_slots < 1:
            raise UsageError(f"num_slots must be at least 1, got {num_slots}")
        if not gate_logit_normalizer > 0:
            raise UsageError(f"gate_logit_normalizer must be above 0, got {gate_logit_normalizer}")
        if gating == "data_independent" and gate_source != "f_proj":
            raise UsageError(
                f"gating='data_independent' learns its gates and reads no input, so gate_source={gate_source!r} "
                "would do nothing; leave gate_source out"
            )
        if use_short_conv and conv_size < 2:
            raise UsageError(f"conv_size must be at least 2, got {conv_size}; use_short_conv=False turns it off")

        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.num_slots, self.states, self.layer_idx = num_slots, states, layer_idx
        self.sequences = WholeSequences()
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.gating, self.gate_source, self.gate_logit_normalizer = gating, gate_source, gate_logit_normalizer
        self.feature_map = FEATURE_MAPS[feature_map]
        self.value_activation = ACTIVATIONS[value_activation]
        self.silu_before = feature_map == value_activation == "swish"
        silu_in_norm = use_norm and output_activation == "swish"
        self.output_activation = ACTIVATIONS["identity" if silu_in_norm else output_activation]

        kv_key_dim, kv_value_dim = num_kv_heads * self.head_k_dim, num_kv_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_value_dim, bias=False)
        self.f_proj: nn.Linear | None = None
        if gating == "data_independent":
            self.f_bias = nn.Parameter(torch.empty(num_kv_heads, num_slots))
            self.reset_gates()
        elif gate_source == "f_proj":
            self.f_proj = nn.Linear(hidden_size, num_kv_heads * num_slots, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, conv_size)
            self.k_conv1d = ShortConvolution(kv_key_dim, conv_size)
            self.v_conv1d = ShortConvolution(kv_value_dim, conv_size)
        self.use_short_conv = use_short_conv
        self.g_norm: RMSNorm | None = None
        if use_norm:
            norm = SiluRMSNorm if silu_in_norm else RMSNorm
            self.g_norm = norm(value_dim, eps=norm_eps, elementwise_affine=elementwise_affine)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def reset_gates(self) -> None:
        """Data-independent gates start with memory lengths 1/(1-α) spread evenly on a log scale from 2 to 1024."""
        length = torch.logspace(1, 10, self.num_slots, base=2.0)
        g = torch.log1p(-1 / length) * self.gate_logit_normalizer
        with torch.no_grad():  # invert g = logsigmoid(f): f = g - log(1 - e^g)
            self.f_bias.copy_((g - torch.log(-torch.expm1(g))).expand_as(self.f_bias))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, slots={self.num_slots}, gating={self.gating}"

    def mixing_flops(self, length: int) -> float:
        """FLOPs a token of the operator: see `flash_gsa.models.flops`."""
        return 2 * self.num_slots * (self.head_k_dim + self.head_v_dim) * (self.num_kv_heads + self.num_heads)

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: MutableMapping[int, dict[str, Any]] | None = None,
    ) -> Tensor:
        """Mix over time: x [B, T, d] → [B, T, d].

        Args:
            attention_mask: [B, T], 1 for a token, 0 for padding, which leaves the state as it is.
            cu_seqlens: [S+1] boundaries of packed sequences (B = 1).
            cache: carries the state from piece to piece; this layer's entry is read and replaced.

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
        q, k, v, g, s = self.project(x, attention_mask=attention_mask, cu_seqlens=cu_seqlens, past=past, carry=carry)
        state = None if past is None else past["state"]
        if x.shape[1] == 1 and state is not None and cu_seqlens is None:
            o, state = gated_slot_attention_step(
                q[:, 0], k[:, 0], v[:, 0], g[:, 0], None if s is None else s[:, 0], state=state
            )
            o = o[:, None]
        else:
            o, state = self.sequences.gated_slot_attention(
                q,
                k,
                v,
                g,
                s,
                # A cache may keep it in bfloat16, which is for single tokens.
                initial_state=None if state is None else (widened(state[0]), widened(state[1])),
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                states=self.states,
            )
        if cache is not None:
            cache[self.layer_idx] = carry | {"state": state}
        y = self.output_activation(o.flatten(-2))
        return self.o_proj(y) if self.g_norm is None else normed_projection(y, self.g_norm, self.o_proj)

    def project(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past: dict[str, Any] | None = None,
        carry: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The operator's inputs for x [B, T, d].

        Returns:
            q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V]; g and s [B, T, H, M] in float32, s being None where it
            is 1 - e^g. `past` is this layer's cache entry; what the next piece needs is put into `carry`.
        """
        carry = {} if carry is None else carry
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x.dtype)
        maps = [self.q_proj, self.k_proj, self.v_proj]
        q, k, v, *f = projections(x, *maps if self.f_proj is None else (*maps, self.f_proj))
        logits = self._gate_logits(k, *f)
        if self.use_short_conv:
            tails = (None, None, None) if past is None else past["conv"]
            known = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
            q, q_tail = self.q_conv1d(q, tail=tails[0], **known)
            k, k_tail = self.k_conv1d(k, tail=tails[1], **known)
            v, v_tail = self.v_conv1d(v, tail=tails[2], **known)
            carry["conv"] = (q_tail, k_tail, v_tail)

        q = q.unflatten(-1, (self.num_heads, self.head_k_dim))
        k = k.unflatten(-1, (self.num_kv_heads, self.head_k_dim))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_v_dim))
        if self.silu_before:
            q, k, v = silu_each(q, k, v)
        else:
            q, k, v = self.feature_map(q), self.feature_map(k), self.value_activation(v)
        g, s = self._gates(logits, attention_mask, cu_seqlens, past, carry)
        return q, k, v, g.expand(*x.shape[:2], -1, -1), s

    def _gate_logits(self, k: Tensor, f: Tensor | None = None) -> Tensor:
        """[B, T, H, M], or [H, M] where they are the same for every token."""
        if self.gating == "data_independent":
            return self.f_bias
        if f is None:
            f = F.adaptive_avg_pool1d(k, self.num_kv_heads * self.num_slots)
        return f.unflatten(-1, (self.num_kv_heads, self.num_slots))

    def _gates(self, logits, mask, cu_seqlens, past, carry) -> tuple[Tensor, Tensor | None]:
        token = None if mask is None else mask[..., None, None].bool()
        if self.gating != "abc":
            g = log_gates(logits, self.gate_logit_normalizer)
            # With g = 0 the derived strength 1 - e^g is 0: padding neither forgets nor writes.
            return (g if token is None else g.masked_fill(~token, 0.0)), None

        # The gates are float32 whatever the layer is; 16 bits are widened where they are read.
        if token is not None or logits.dtype == torch.float64:
            logits = logits.float()
        if token is not None:
            logits = logits.masked_fill(~token, _NOTHING)
        z = None if past is None else past["normalizer"]
        if logits.shape[1] == 1 and z is not None and cu_seqlens is None:
            g, s, z = (y[:, None] for y in abc_gates_step(logits[:, 0], z))
            z = z[:, 0]
        else:
            g, s, z = self.sequences.abc_gates(logits, z, cu_seqlens)
        carry["normalizer"] = z
        if token is not None:
            g, s = g.masked_fill(~token, 0.0), s.masked_fill(~token, 0.0)
        return g, s
