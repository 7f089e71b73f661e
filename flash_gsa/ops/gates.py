"""ABC, attention with bounded-memory control, as gates of the gated operator.

ABC (Peng et al., ACL 2022) writes token j into slot m with the weight exp(l_jm) normalised by everything
written so far, z_t = log Σ_{j≤t} exp(l_j):

    K̃_t = Σ_{j≤t} exp(l_j - z_t) ⊗ k_j = e^{z_{t-1}-z_t} K̃_{t-1} + e^{l_t-z_t} ⊗ k_t

so it is gated slot attention with g_t = z_{t-1} - z_t and s_t = e^{l_t - z_t}. Written through the
logistic function of l_t - z_{t-1} both keep their digits: g_t = log σ(z_{t-1} - l_t), s_t = σ(l_t - z_{t-1}).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .triton.available import runs_on
from .validation import FLOATS, check_cu_seqlens

try:
    from .triton import abc as kernels
except ModuleNotFoundError as error:  # torch's CPU build brings no Triton
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

# The normalizer where nothing was written.
NOTHING = float("-inf")


def abc_gates(
    logits: Tensor,
    *,
    initial_normalizer: Tensor | None = None,
    output_final_normalizer: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gates that make `gated_slot_attention` compute ABC: `g, s = abc_gates(logits)`.

        z_t = log Σ_{j≤t} exp(l_j),   g_t = z_{t-1} - z_t,   s_t = exp(l_t - z_t)

    At the first token of a sequence nothing has been written: s = 1, and g = 0 (it meets a zero state).
    A sequence continued in pieces carries z as the normalizer; `abc_gates_step` is one token of it.

    Args:
        logits: [B, T, H, M], any finite floating-point numbers.
        initial_normalizer: z before the first token, [N, H, M] float32 (float64 for float64 logits); N is B,
            or with cu_seqlens the number of sequences. -inf stands for "nothing written yet". None: new sequences.
        output_final_normalizer: also return z after the last token.
        cu_seqlens: [S+1] boundaries of packed sequences (then B = 1).

    Returns:
        (g, s) or (g, s, normalizer): g, s [B, T, H, M] and normalizer [N, H, M], float32 (float64 for
        float64 logits).

    Raises:
        UsageError: shapes or dtypes that do not fit.

    Source: Peng et al., "ABC: Attention with Bounded-memory Control" (ACL 2022); as gates: Zhang et al., 2024, §3.1.
    """
    _check_logits(logits, ("B", "T", "H", "M"))
    B, _, H, M = logits.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logits.shape)
    _check_normalizer(initial_normalizer, (B if cu_seqlens is None else cu_seqlens.numel() - 1, H, M), logits)
    if runs_on(logits):
        g, s, z = kernels.abc_gates(logits, initial_normalizer, cu_seqlens)
    else:
        logits = logits.to(_dtype(logits))
        before, z = _running(logits, initial_normalizer, cu_seqlens)
        g, s = _gates(logits, before)
    return (g, s, z) if output_final_normalizer else (g, s)


def abc_gates_step(logits: Tensor, normalizer: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One token of `abc_gates`: (g, s, new normalizer), for `gated_slot_attention_step`.

    Args:
        logits: [B, H, M].
        normalizer: z so far, [B, H, M]; None at the start of a sequence.

    Returns:
        g, s and the new normalizer, each [B, H, M] float32 (float64 for float64 logits).

    Raises:
        UsageError: shapes or dtypes that do not fit.
    """
    _check_logits(logits, ("B", "H", "M"))
    _check_normalizer(normalizer, tuple(logits.shape), logits)
    logits = logits.to(_dtype(logits))
    z = torch.full_like(logits, NOTHING) if normalizer is None else normalizer
    g, s = _gates(logits, z)
    return g, s, torch.logaddexp(z, logits)


def _running(logits: Tensor, z0: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """z before every token [B, T, H, M], and after every sequence [N, H, M]."""
    B, T, H, M = logits.shape
    if z0 is None:
        z0 = logits.new_full((B if cu_seqlens is None else cu_seqlens.numel() - 1, H, M), NOTHING)
    # The gradient of logcumsumexp at -inf is NaN; where nothing is written yet, it is 0.
    z0 = torch.where(z0 == NOTHING, z0.detach(), z0)
    if cu_seqlens is None:
        z = torch.cat([z0[:, None], logits], dim=1).logcumsumexp(dim=1)
        return z[:, :-1], z[:, -1].clone()  # which a cache may hold, without all of z
    if T == 0:
        return logits, z0

    bounds = cu_seqlens.to(logits.device, torch.int64)
    token = torch.arange(T, device=logits.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    position = (token - bounds[sequence])[None, :, None, None]
    # Sums over 1, 2, 4, … tokens of a sequence: no look at the lengths, which may lie on a GPU.
    z, reach = logits, 1
    while reach < T:
        z = torch.logaddexp(z, z.roll(reach, 1).masked_fill(position < reach, NOTHING))
        reach *= 2
    initial = z0[sequence][None]
    z = torch.logaddexp(z, initial)
    before = torch.where(position == 0, initial, z.roll(1, 1))
    empty = bounds.diff() == 0
    return before, torch.where(empty[:, None, None], z0, z[0, (bounds[1:] - 1).clamp(min=0)])


def _gates(logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    first = before == NOTHING
    # A finite stand-in keeps the branch that is not taken, and its gradient, finite.
    margin = logits - before.masked_fill(first, 0.0)
    g = F.logsigmoid(-margin).masked_fill(first, 0.0)
    s = torch.sigmoid(margin).masked_fill(first, 1.0)
    return g, s


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_normalizer(z: Tensor | None, shape: tuple[int, ...], logits: Tensor) -> None:
    dtype = _dtype(logits)
    if z is not None and not isinstance(z, Tensor):
        raise UsageError(f"the normalizer must be a torch.Tensor {list(shape)}, got {type(z).__name__}")
    if z is not None and (tuple(z.shape) != shape or z.dtype != dtype or z.device != logits.device):
        raise UsageError(
            f"the normalizer must have shape {list(shape)}, dtype {dtype} and be on {logits.device}, "
            f"got {list(z.shape)}, {z.dtype}, {z.device}"
        )


def _check_logits(logits, names: tuple[str, ...]) -> None:
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATS or logits.dim() != len(names):
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"logits must be a floating-point tensor [{', '.join(names)}], got {got}")
