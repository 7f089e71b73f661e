"""HGRN2: gated linear attention in which what is not forgotten is what is not written."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import ShortConvolution
from .linear_attention import LinearAttentionMixer, widened, without_padding
from .norm import RMSNorm


class HGRN2(LinearAttentionMixer):
    """The HGRN2 token mixer: forget gates f with a lower bound β, and 1 - f in the place of keys.

        q, v = φ(W_q x), W_i x
        f    = β + (1 - β) σ(W_f x)         for every dimension of every key/value head; g = log f
        y    = W_o RMSNorm(GLA(q, 1 - f, v, g))         the norm over all heads

    The bound is given to `forward` as `lower_bound` [H·K], numbers in (0, 1]; None means 0. In a model there is one for
    every layer, learned and growing with depth, so that upper layers remember longer: see `lower_bounds`.

    Args:
        hidden_size, num_heads, num_kv_heads, expand_k, expand_v, use_short_conv, conv_size, layer_idx:
            see `LinearAttentionMixer`; the convolutions, without SiLU, are on q, f and i. The paper's state
            expansion is K = hidden_size · expand_k / num_heads.
        feature_map: φ of queries.
        elementwise_affine: whether the RMSNorm has a learned weight; norm_eps: its ε.

    Defaults are those of the published models, whose heads are 128 wide (num_heads = hidden_size / 128).

    Raises:
        UsageError: sizes that do not divide, unknown names.

    Source: Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024. Parameter names and shapes are those of
    published HGRN2 checkpoints.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "swish",
        use_short_conv: bool = False,
        conv_size: int = 4,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ):
        super().__init__(
            hidden_size, num_heads, num_kv_heads, expand_k, expand_v, feature_map, use_short_conv, conv_size, layer_idx
        )
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.f_proj = nn.Linear(hidden_size, self.kv_key_dim, bias=False)
        self.i_proj = nn.Linear(hidden_size, self.kv_value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, activation="identity")
            self.f_conv1d = ShortConvolution(self.kv_key_dim, conv_size, activation="identity")
            self.i_conv1d = ShortConvolution(self.kv_value_dim, conv_size, activation="identity")
        self.g_norm = RMSNorm(self.value_dim, eps=norm_eps, elementwise_affine=elementwise_affine)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def project(self, x, *, attention_mask=None, cu_seqlens=None, past=None, carry=None, lower_bound=None):
        x = without_padding(x, attention_mask)
        q, f, i = self._convolved(self._projected(x, "q", "f", "i"), attention_mask, cu_seqlens, past, carry)
        g, k = gates(widened(f), lower_bound)
        g, k = without_padding(self._keys(g), attention_mask), without_padding(self._keys(k), attention_mask)
        return self.feature_map(self._queries(q)), k.to(i.dtype), self._values(i), g

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.g_norm(o.flatten(-2)))


def gates(logits: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log f, 1 - f) for f = β + (1 - β) σ(x), accurate where f is near 0 and where it is near 1.

    1 - f = (1 - β) σ(-x) subtracts nothing from 1 that is nearly 1. log f is the log of 1 less that, where that is
    small; elsewhere log σ(x) + log(1 + β e^{-x}), which does not need f itself.
    """
    keep, write = F.logsigmoid(logits), torch.sigmoid(-logits)
    if lower_bound is None:
        return keep, write
    write = (1 - lower_bound) * write
    low = keep + F.softplus(lower_bound.log() - logits)
    return torch.where(write < 0.5, torch.log1p(-write.clamp(max=0.5)), low), write


def lower_bounds(logits: Tensor) -> list[Tensor | None]:
    """The lower bounds of all layers' forget gates: logits [L, D] → for each layer [D], or None for 0.

        β_1 = 0,    β_i = Σ_{1<j≤i} γ_j    with γ = softmax of the logits over the layers

    They grow with depth and stay below 1. With logits of 0, as models begin, β_i = (i - 1) / L.
    Source: Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023, §3.2.
    """
    shares = widened(logits).softmax(dim=0)
    return [None, *shares[1:].cumsum(dim=0).clamp(max=1.0).unbind(0)]
