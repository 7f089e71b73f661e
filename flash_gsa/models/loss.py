"""Next-token cross entropy from hidden states, without the full table of logits.

    z_t = W h_t                          W [V, d], h_t [d]
    nll_t = logsumexp(z_t) - z_t[y_t]
    loss = Σ_t nll_t / n                 over the n positions with y_t ≠ -100

Logits in fp32 take 4·N·V bytes, and their gradient as much again: 8 GiB for 32k tokens and a vocabulary
of 32,000. The loss is therefore computed for some tokens at a time. Its gradient needs the same logits, so it
is computed with them in the forward pass, exactly, and only scaled in the backward pass; computing the logits
a second time would cost a quarter more.

    P = softmax(z) - onehot(y) where scored, else 0          dh = P W,  dW = Σ Pᵀ h, the sum in fp32

On a GPU one Triton kernel reads the logits of a piece in the products' format and writes P in their place.
Elsewhere, and for fp64, it is the same in PyTorch; a table of few logits is then made as a whole.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_gsa.ops.once import refuse_second_derivative
from flash_gsa.ops.products import add_product
from flash_gsa.ops.triton.available import runs_on

try:
    from flash_gsa.ops.triton import cross_entropy as kernels
except ModuleNotFoundError as error:  # torch's CPU build brings no Triton
    if error.name != "triton":
        raise
    kernels = None  # type: ignore[assignment]

IGNORED = -100
"""The target of a position that is not scored."""

PLAIN_LIMIT = 1 << 25
"""Without the kernel, up to so many logits (N·V; 128 MiB of fp32) are there at once."""

PIECE_BYTES = 1 << 28
"""With it, logits of so many bytes: 4096 rows of 32,000 in 16 bits. More rows hardly make a GPU's products faster."""

ROWS_AT_ONCE = 256
"""Of more rows than these a multiple of them makes a piece: whole tiles of the GPU's products."""

ALIGNED = 64
"""Rows of logits begin at multiples of so many numbers, whatever V is: kernel and products load 16 bytes at once."""


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scored: int | None = None,
    at_once: int | None = None,
) -> Tensor:
    """Cross entropy in nats, summed over the scored positions and divided by `scored`.

    Args:
        hidden: `[..., d]`, any floating dtype.
        weight: `[V, d]`, the output matrix.
        targets: `[...]`, int64 in [0, V), or -100 where nothing is to be predicted.
        scored: the divisor; by default the number of scored positions in `targets`. With gradient
            accumulation it is the number in all micro-batches of the step, so that every token weighs
            the same however the micro-batches were filled.
        at_once: so many logits are in memory at once; by default as many as suit the device. Where the kernel runs,
            more than 256 rows of them are rounded down to a multiple of 256.

    Returns:
        A scalar in fp32; 0 if nothing is scored. Logits are computed in autocast's dtype where autocast
        is on, else in that of `hidden`; the log-sum-exp is fp32 (fp64 for fp64 input). It can be
        differentiated once, by `hidden` and `weight`.
    """
    hidden, targets = _rows(hidden, targets)
    if scored is None:
        scored = int((targets != IGNORED).sum())
    fused = _fused(hidden)
    if not fused and targets.numel() * weight.shape[0] <= (PLAIN_LIMIT if at_once is None else at_once):
        logits = _widened(F.linear(hidden, weight))
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    else:
        dtype = _compute_dtype(hidden)
        arguments = hidden, weight, targets, _piece(weight.shape[0], dtype, fused, at_once), dtype
        needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        if torch.compiler.is_compiling():
            total = _in_pieces_op(*arguments, *needed)[0]
        elif any(needed):
            total = _InPieces.apply(*arguments, *needed)
        else:
            total = _in_pieces(*arguments, False, False)[0].sum()
    return total / max(1, scored)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, at_once: int | None = None) -> Tensor:
    """Cross entropy in nats of every position, fp32, shaped like `targets`; 0 where nothing is scored."""
    flat, dtype = hidden.reshape(-1, hidden.shape[-1]), _compute_dtype(hidden)
    rows = _piece(weight.shape[0], dtype, _fused(flat), at_once)
    return _in_pieces(flat, weight, targets.reshape(-1), rows, dtype, False, False)[0].view(targets.shape)


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


def _fused(x: Tensor) -> bool:
    return kernels is not None and runs_on(x)


def _piece(V: int, dtype: torch.dtype, fused: bool, at_once: int | None) -> int:
    """Rows of a piece."""
    if at_once is None:
        at_once = PIECE_BYTES // dtype.itemsize if fused else PLAIN_LIMIT
    rows = max(1, at_once // V)
    return rows - rows % ROWS_AT_ONCE if fused and rows > ROWS_AT_ONCE else rows


def _in_pieces(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """nll of each row, and Σ nll's gradients: by `hidden` in the products' format, by `weight` in that of the sum."""
    N, V = hidden.shape[0], weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        w, losses = weight.to(dtype), []
        table = hidden.new_empty(min(rows, N), -(-V // ALIGNED) * ALIGNED, dtype=dtype)[:, :V]
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=_widened(w[:0]).dtype) if need_weight else None
        for start in range(0, max(1, N), rows):
            h, y = hidden[start : start + rows].to(dtype), targets[start : start + rows]
            logits = torch.mm(h, w.t(), out=table[: h.shape[0]])
            losses.append(_row_losses(logits, y, need_hidden or need_weight))
            if grad_hidden is not None:
                torch.mm(logits, w, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                add_product(grad_weight, logits.t(), h, start == 0)
    return torch.cat(losses), grad_hidden, grad_weight


def _row_losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """nll of each row; with `gradient`, P is written in place of the logits."""
    if _fused(logits):
        return kernels.row_losses(logits, targets, IGNORED, gradient)
    scored, index = targets != IGNORED, targets.clamp_min(0).unsqueeze(-1)
    log_p = torch.log_softmax(_widened(logits), dim=-1)
    losses = -(log_p.gather(-1, index).squeeze(-1) * scored)
    if gradient:
        grad = log_p.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=log_p.dtype))
        logits.copy_(grad.mul_(scored.unsqueeze(-1)))
    return losses


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · x, rounded once."""
    if _fused(x) and not torch.compiler.is_compiling():
        return kernels.scaled(x, factor, dtype)
    return (_widened(x) * factor).to(dtype)


class _InPieces(torch.autograd.Function):
    """Σ nll, its gradients computed with it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, dtype, need_hidden, need_weight):
        losses, *gradients = _in_pieces(hidden, weight, targets, rows, dtype, need_hidden, need_weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # what was saved leads to no input, so nobody would be told later
            refuse_second_derivative("The loss")
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else _scaled(g, grad_output, dtype) for g, dtype in pairs), *[None] * 5


@torch.library.custom_op("flash_gsa::cross_entropy", mutates_args=())
def _in_pieces_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one operator, for torch.compile; an empty tensor for an absent gradient."""
    losses, dh, dw = _in_pieces(hidden, weight, targets, rows, dtype, need_hidden, need_weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dh = hidden.new_empty(0, dtype=dtype) if dh is None else dh
    dw = weight.new_empty(0, dtype=wide) if dw is None else dw
    return losses.sum(), dh, dw


@_in_pieces_op.register_fake
def _(hidden, weight, targets, rows, dtype, need_hidden, need_weight):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if need_hidden else 0, dtype=dtype),
        weight.new_empty(weight.shape if need_weight else 0, dtype=wide),
    )


def _save(ctx, inputs, output) -> None:
    hidden, weight, *_, need_hidden, need_weight = inputs
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = hidden.dtype if need_hidden else None, weight.dtype if need_weight else None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_):
    pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *(None if dtype is None else (_widened(g) * grad_output).to(dtype) for g, dtype in pairs), *[None] * 5


_in_pieces_op.register_autograd(_backward, setup_context=_save)
