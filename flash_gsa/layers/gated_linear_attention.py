"""GLA: gated linear attention with gates computed from the input."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .convolution import ShortConvolution
from .linear_attention import GatedRMSNorm, LinearAttentionMixer, widened, without_padding


class GatedLinearAttention(LinearAttentionMixer):
    """The GLA token mixer: a gate for every dimension of every key, and a gate on the output.

        q, k, v = φ(W_q x), φ(W_k x), W_v x
        g       = logsigmoid(W_2 W_1 x + b) / τ             log forget gates, from a projection of low rank
        y       = W_o (RMSNorm(GLA(q, k, v, g)) ∘ SiLU(W_g x))      the norm over each head

    Args:
        hidden_size, num_heads, num_kv_heads, expand_k, expand_v, use_short_conv, conv_size, layer_idx:
            see `LinearAttentionMixer`; the convolutions, with SiLU, are on q, k and v.
        feature_map: φ of queries and keys.
        gate_logit_normalizer: τ > 0, damps the gate: α = σ(·)^{1/τ}.
        gate_low_rank_dim: rank of the gate's projection.
        elementwise_affine: whether the RMSNorm has a learned weight, one for all heads; norm_eps: its ε.

    Defaults are the paper's and those of the published models: keys of half the width, τ = 16, rank 16. Initially
    b = 0, so that with small weights a dimension of the memory halves in τ tokens.

    Raises:
        UsageError: sizes that do not divide, unknown names, numbers out of range.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, §4.4. Parameter
    names and shapes are those of published GLA checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        feature_map: str = "identity",
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        use_short_conv: bool = False,
        conv_size: int = 4,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, expand_k, expand_v, feature_map, use_short_conv, conv_size, layer_idx
        )
        if not gate_logit_normalizer > 0:
            raise UsageError(f"gate_logit_normalizer must be above 0, got {gate_logit_normalizer}")
        if gate_low_rank_dim < 1:
            raise UsageError(f"gate_low_rank_dim must be at least 1, got {gate_low_rank_dim}")
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.kv_key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.kv_value_dim, bias=False)
        upper = nn.Linear(gate_low_rank_dim, self.kv_key_dim)
        nn.init.zeros_(upper.bias)
        self.gk_proj = nn.Sequential(nn.Linear(hidden_size, gate_low_rank_dim, bias=False), upper)
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
        g = F.logsigmoid(widened(self._keys(self.gk_proj(x)))) / self.gate_logit_normalizer
        return q, without_padding(k, attention_mask), v, without_padding(g, attention_mask)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).unflatten(-1, o.shape[2:])
        return self.o_proj(self.g_norm_swish_gate(o, gate).flatten(-2))
