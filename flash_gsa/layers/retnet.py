"""RetNet: multi-scale retention, gated linear attention with constant gates and rotary positions."""

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .convolution import ShortConvolution
from .linear_attention import GatedRMSNorm, LinearAttentionMixer, without_padding
from .rotary import count_tokens, rotate, rotation


class MultiScaleRetention(LinearAttentionMixer):
    """The RetNet token mixer: every head forgets at a rate of its own that is not learned.

        q, k, v = R_t φ(W_q x), R_t φ(W_k x), W_v x         R_t: rotary positions
        g       = log(1 - 2^{-5-h})                         for key/value head h = 0, 1, …, H - 1
        y       = W_o (RMSNorm(GLA(q, k, v, g)) ∘ SiLU(W_g x))      the norm over each head

    so that o_t = K^{-1/2} Σ_{j≤t} γ_h^{t-j} ⟨R_t q_t, R_j k_j⟩ v_j. Head h sees about 2^{5+h} tokens back.

    Args:
        hidden_size, num_heads, num_kv_heads, expand_k, expand_v, use_short_conv, conv_size, layer_idx:
            see `LinearAttentionMixer`; the convolutions, with SiLU, are on q, k and v. K must be even. The cache
            entry also holds `seen` [N], how many tokens each sequence has had.
        feature_map: φ of queries and keys.
        rope_theta: θ of the rotary positions.
        elementwise_affine: whether the RMSNorm has a learned weight, one for all heads; norm_eps: its ε.

    Defaults are the paper's and those of the published models: values of twice the width. The paper's normalisations
    of the scores are left out, as the RMSNorm undoes them; its group norm is, as in the published models, an RMSNorm.

    Raises:
        UsageError: sizes that do not divide, unknown names, numbers out of range.

    Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, §2. Parameter
    names and shapes are those of published RetNet checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        feature_map: str = "identity",
        rope_theta: float = 10000.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, expand_k, expand_v, feature_map, use_short_conv, conv_size, layer_idx
        )
        if self.head_k_dim % 2:
            raise UsageError(
                f"retnet: hidden_size · expand_k = {self.key_dim} must be a multiple of 2·num_heads = {2 * num_heads} "
                "(rotary positions turn pairs of a head's dimensions)"
            )
        if not rope_theta > 0:
            raise UsageError(f"retnet: rope_theta must be above 0, got {rope_theta}")
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.kv_key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.kv_value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size)
            self.k_conv1d = ShortConvolution(self.kv_key_dim, conv_size)
            self.v_conv1d = ShortConvolution(self.kv_value_dim, conv_size)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.g_norm_swish_gate = GatedRMSNorm(self.head_v_dim, eps=norm_eps, elementwise_affine=elementwise_affine)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def project(self, x, *, attention_mask=None, cu_seqlens=None, past=None, carry=None):
        x = without_padding(x, attention_mask)
        q, k, v = self._convolved(self._projected(x, "q", "k", "v"), attention_mask, cu_seqlens, past, carry)
        q, k, v = self.feature_map(self._queries(q)), self.feature_map(self._keys(k)), self._values(v)

        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        seen = torch.zeros(sequences, dtype=torch.int64, device=x.device) if past is None else past["seen"]
        position, seen = count_tokens(x, seen, attention_mask, cu_seqlens, self.sequences.first(x.shape[1]))
        if carry is not None:
            carry["seen"] = seen
        turn = rotation(position, self.head_k_dim, self.rope_theta)
        q, k = rotate(q, *turn), rotate(k, *turn)
        g = log_decays(self.num_kv_heads, x)[:, None].expand(*x.shape[:2], -1, -1)
        return q, without_padding(k, attention_mask), v, without_padding(g, attention_mask)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).unflatten(-1, o.shape[2:])
        return self.o_proj(self.g_norm_swish_gate(o, gate).flatten(-2))


def log_decays(heads: int, like: Tensor) -> Tensor:
    """log(1 - 2^{-5-h}) of the heads h = 0, 1, …: [H], float32 or, beside a float64 tensor, float64."""
    head = torch.arange(heads, device=like.device, dtype=torch.float64)
    return torch.log1p(-(2.0 ** (-5 - head))).to(torch.promote_types(like.dtype, torch.float32))
