"""ABC, attention with bounded-memory control, as gates of the gated operator.

ABC (Peng et al., ACL 2022) writes token j into slot m with the weight exp(l_jm) normalised by everything
written so far, z_t = log Σ_{j≤t} exp(l_j):

    K̃_t = Σ_{j≤t} exp(l_j - z_t) ⊗ k_j = e^{z_{t-1}-z_t} K̃_{t-1} + e^{l_t-z_t} ⊗ k_t

so it is gated slot attention with g_t = z_{t-1} - z_t and s_t = e^{l_t - z_t}. Written through the
logistic function of l_t - z_{t-1} both keep their digits: g_t = log σ(z_{t-1} - l_t), s_t = σ(l_t - z_{t-1}).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .validation import FLOATS, check_cu_seqlens


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
    logits = logits.to(_dtype(logits))
    B, _, H, M = logits.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logits.shape)
        bounds = cu_seqlens.tolist()
        pieces = [logits[:, a:b] for a, b in pairwise(bounds)]
    else:
        pieces = [logits]
    N = len(pieces) if cu_seqlens is not None else B
    carried = _initial(initial_normalizer, (N, H, M), logits)

    before, finals = [], []
    for n, piece in enumerate(pieces):
        z0 = carried if cu_seqlens is None else carried[n : n + 1]
        # The gradient of logcumsumexp at -inf is NaN; where nothing is written yet, it is 0.
        z0 = torch.where(z0 == float("-inf"), z0.detach(), z0)
        z = torch.cat([z0[:, None], piece], dim=1).logcumsumexp(dim=1)
        before.append(z[:, :-1])
        finals.append(z[:, -1])
    g, s = _gates(logits, torch.cat(before, dim=1))
    return (g, s, torch.cat(finals)) if output_final_normalizer else (g, s)


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
    logits = logits.to(_dtype(logits))
    z = _initial(normalizer, tuple(logits.shape), logits)
    g, s = _gates(logits, z)
    return g, s, torch.logaddexp(z, logits)


def _gates(logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    first = before == float("-inf")
    # A finite stand-in keeps the branch that is not taken, and its gradient, finite.
    margin = logits - before.masked_fill(first, 0.0)
    g = F.logsigmoid(-margin).masked_fill(first, 0.0)
    s = torch.sigmoid(margin).masked_fill(first, 1.0)
    return g, s


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _initial(z: Tensor | None, shape: tuple[int, ...], logits: Tensor) -> Tensor:
    if z is None:
        return logits.new_full(shape, float("-inf"))
    if tuple(z.shape) != shape or z.dtype != logits.dtype or z.device != logits.device:
        raise UsageError(
            f"the normalizer must have shape {list(shape)}, dtype {logits.dtype} and be on {logits.device}, "
            f"got {list(z.shape)}, {z.dtype}, {z.device}"
        )
    return z


def _check_logits(logits, names: tuple[str, ...]) -> None:
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATS or logits.dim() != len(names):
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"logits must be a floating-point tensor [{', '.join(names)}], got {got}")
