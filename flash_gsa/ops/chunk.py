"""The chunkwise form in PyTorch: matrix products inside chunks, one scan of states between them.

Per chunk of C tokens, with G_t the sum of the log gates from the chunk's start to token t (inclusive),
everything per slot, K̃₀ and Ṽ₀ the states at the chunk's start (Zhang et al., 2024, Algorithm 1 and Listing 1):

    ℓ_t  = e^{G_t} ∘ (q_t K̃₀ᵀ) + Σ_{j≤t} (q_t·k_j) s_j e^{G_t-G_j}        p_t = softmax(ℓ_t)
    a_tj = Σ_m p_tm s_jm e^{G_tm-G_jm}                                     (j ≤ t)
    o_t  = (p_t ∘ e^{G_t}) Ṽ₀ + Σ_{j≤t} a_tj v_j
    K̃₁   = e^{G_C} ∘ K̃₀ + Σ_j (s_j e^{G_C-G_j}) ⊗ k_j                     (Ṽ₁ likewise with v)

Gated linear attention is the same without the first line and the softmax: its queries stand for p, its keys for s.
`chunk_layout.py` cuts the sequences, `chunk_sums.py` computes the sums, exactly for any gates.
"""

from torch import Tensor

from .chunk_layout import layout_of
from .chunk_sums import DecayedSums
from .reference import empty_state, reference_step, write_strength
from .reference_linear import empty_linear_state, reference_linear_step
from .registry import Backend, State
from .validation import state_dtype


def chunk_forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens) -> tuple[Tensor, State | None]:
    """`gated_slot_attention` by chunks; arguments as there, already validated."""
    dtype, H = state_dtype(q), k.shape[2]
    layout = layout_of(q, cu_seqlens)
    hk, hv = initial_state or empty_state(q, k, v, g, layout.sequences)
    rows = layout.cut(q.to(dtype) * scale).unflatten(1, (H, -1))  # [n, H, R, C, K]
    k, v, g = (layout.cut(x.to(dtype)) for x in (k, v, g))  # [n, H, C, K | V | M]
    s = write_strength(g) if s is None else layout.cut(s.to(dtype))

    sums = DecayedSums(g, s)
    k0, hk = sums.states(k, layout.sort(hk.transpose(2, 3)), layout.waves)  # K̃ before each chunk; after the last
    v0, hv = sums.states(v, layout.sort(hv), layout.waves)
    p = sums.scores(rows, k, k0).softmax(dim=-1)
    o = layout.join(sums.read(p, v, v0).flatten(1, 2)).to(q.dtype)
    if not output_final_state:
        return o, None
    return o, (layout.unsort(hk).transpose(2, 3).contiguous(), layout.unsort(hv))


def chunk_linear_forward(
    q, k, v, g, scale, initial_state, output_final_state, cu_seqlens
) -> tuple[Tensor, Tensor | None]:
    """`gated_linear_attention` by chunks; arguments as there, already validated."""
    dtype, H = state_dtype(q), k.shape[2]
    layout = layout_of(q, cu_seqlens)
    state = empty_linear_state(q, k, v, layout.sequences) if initial_state is None else initial_state
    rows = layout.cut(q.to(dtype) * scale).unflatten(1, (H, -1))
    k, v, g = (layout.cut(x.to(dtype)) for x in (k, v, g))

    sums = DecayedSums(g, k)
    before, state = sums.states(v, layout.sort(state), layout.waves)
    o = layout.join(sums.read(rows, v, before).flatten(1, 2)).to(q.dtype)
    return o, layout.unsort(state) if output_final_state else None


BACKEND = Backend(
    name="chunk",
    forward=chunk_forward,
    unsupported=lambda problem: None,
    priority=10,
    step=reference_step,
    linear_forward=chunk_linear_forward,
    linear_step=reference_linear_step,
)
