"""Next-token cross entropy from hidden states, without the full table of logits.

    z_t = W h_t                          W [V, d], h_t [d]
    nll_t = logsumexp(z_t) - z_t[y_t]
    loss = Σ_t nll_t / n                 over the n positions with y_t ≠ -100

Logits in fp32 take 4·N·V bytes, and their gradient as much again: 8 GiB for 32k tokens and a vocabulary
of 32,000. Above `PLAIN_LIMIT` logits the loss is therefore computed for some tokens at a time. The gradient
needs the same logits, so it is computed with them in the forward pass, exactly, and only scaled in the
backward pass; computing the logits a second time would cost a quarter more.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a position that is not scored."""

PLAIN_LIMIT = 1 << 25
"""Up to so many logits (N·V; 128 MiB of fp32) the whole table is made at once."""


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scored: int | None = None,
    plain_limit: int = PLAIN_LIMIT,
) -> Tensor:
    """Cross entropy in nats, summed over the scored positions and divided by `scored`.

    Args:
        hidden: `[..., d]`, any floating dtype.
        weight: `[V, d]`, the output matrix.
        targets: `[...]`, int64 in [0, V), or -100 where nothing is to be predicted.
        scored: the divisor; by default the number of scored positions in `targets`. With gradient
            accumulation it is the number in all micro-batches of the step, so that every token weighs
            the same however the micro-batches were filled.
        plain_limit: more than so many logits are computed in pieces.

    Returns:
        A scalar in fp32; 0 if nothing is scored. Logits are computed in autocast's dtype where autocast
        is on, else in that of `hidden`; the log-sum-exp is fp32 (fp64 for fp64 input). It can be
        differentiated once, by `hidden` and `weight`.
    """
    hidden, targets = _rows(hidden, targets)
    if scored is None:
        scored = int((targets != IGNORED).sum())
    if targets.numel() * weight.shape[0] <= plain_limit:
        logits = _widened(F.linear(hidden, weight))
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    else:
        rows = max(1, plain_limit // weight.shape[0])
        total = _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, _compute_dtype(hidden))
    return total / max(1, scored)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, plain_limit: int = PLAIN_LIMIT) -> Tensor:
    """Cross entropy in nats of every position, fp32, shaped like `targets`; 0 where nothing is scored."""
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = max(1, plain_limit // weight.shape[0])
    pieces = [
        F.cross_entropy(_widened(F.linear(h, weight)), y, ignore_index=IGNORED, reduction="none")
        for h, y in zip(flat_hidden.split(rows), flat_targets.split(rows), strict=True)
    ]
    return torch.cat(pieces).view(targets.shape)


def _rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`hidden` [N, d] and `targets` [N], without unscored positions where leaving them out costs no waiting.

    On a GPU the number of scored positions is only known there, and asking for it would stall the stream.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if hidden.device.type != "cpu":
        return hidden, targets
    keep = targets != IGNORED
    return (hidden, targets) if bool(keep.all()) else (hidden[keep], targets[keep])


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ nll over `rows` tokens at a time; d nll / dz = softmax(z) - onehot(y), so
    dh = (softmax(z) - onehot(y)) W and dW = Σ (softmax(z) - onehot(y))ᵀ h, the sum kept in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, dtype):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            total = torch.zeros((), device=hidden.device, dtype=_widened(hidden[:0]).dtype)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                h, y = hidden[part].to(dtype), targets[part]
                log_p = torch.log_softmax(_widened(h @ w.t()), dim=-1)
                scored = (y != IGNORED).unsqueeze(-1)
                index = y.clamp_min(0).unsqueeze(-1)
                total -= (log_p.gather(-1, index) * scored).sum()
                if not (need_hidden or need_weight):
                    continue
                grad = log_p.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=log_p.dtype))
                grad = grad.mul_(scored).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ w
                if grad_weight is not None:
                    grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grads = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None
