"""ABC's gates and their gradient: running sums over time, in parallel over segments of a sequence.

Forward, with m_t the largest logit so far and c_t = Σ_{j≤t} e^{l_j - m_t}, so that z_t = m_t + log c_t:

    x_t = (l_t - m_{t-1}) - log c_{t-1},   g_t = log σ(-x_t),   s_t = σ(x_t)

Nothing large is ever rounded: logits near 10⁴ give gates as exact as logits near 0. Pairs (m, c) of stretches of time
combine associatively, so segments are summed first, each alone, and then every segment starts from the sum of those
before it. Where nothing was written yet (c = 0), s = 1 and g = 0, which no other token has.

Backward, from dg, ds and the gradient of the last normalizer. By x, which is l_t - z_{t-1}:

    dx_t = s_t ((1 - s_t) ds_t - dg_t)

and z_t = log(e^{z_{t-1}} + e^{l_t}) passes on (1 - s_t) of its gradient A_t to z_{t-1} and s_t of it to l_t:

    dl_t = dx_t + s_t A_t,   A_{t-1} = (1 - s_t) A_t - dx_t,   A_T = dz_T,   dz_0 = A_0

where 1 - s_t = e^{g_t} is taken from g; at a token before which nothing was written both 1 - s and dx are 0. A
segment turns the A after it into D·A + V; so again segments are done alone first, and then each from those after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from ..once import differentiated, once_differentiable
from .chunks import locate
from .launching import run
from .plan import Parts, cdiv, kept
from .pointwise import log_sigmoid, sigmoid

# Channels (heads and slots together) of a program, which is one warp, and tokens that it loads at once.
CHANNELS, ROWS, BACKWARD_ROWS = 64, 16, 8
# Programs that fill a GPU. Each first reads what the segments before it sum up to, so a sequence has not too many.
PROGRAMS, SEGMENTS, SHORTEST = 2048, 256, 32


@triton.jit
def place(
    cu_seqlens, segment_sequence, first_segment, T, span, C: tl.constexpr, BC: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Of this program: its segment, the sequence, the segment's place there, its first token, how many tokens it and
    all to the sequence's end have, and its channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    segment, oc = program // blocks, program % blocks * BC + tl.arange(0, BC)
    n, index, token, end, _ = locate(segment, cu_seqlens, segment_sequence, first_segment, T, span, PACKED)
    remaining = (end - token).to(tl.int32)
    return segment, n, index, token, tl.minimum(remaining, span), remaining, oc


@triton.jit
def load_row(x, row, length, oc, other, C: tl.constexpr):
    """Row `row` of x [·, C] in float32; `other` from row `length` on."""
    return tl.load(x + row * C + oc, mask=oc < tl.where(row < length, C, 0), other=other).to(tl.float32)


@triton.jit
def subtracted(largest):
    """The largest logit, to be taken from others: 0 for -inf, of which nothing can be taken."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=["T", "sequences", "span"])
def sum_segments(
    logits, largest, total, cu_seqlens, segment_sequence, first_segment, T, sequences, span,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(m, c) [segments, C] of every segment but a sequence's last, alone; grid (segments·blocks of channels,)."""
    if PACKED:
        if tl.program_id(0) // tl.cdiv(C, BC) >= tl.load(first_segment + sequences):
            return
    segment, _, _, token, length, remaining, oc = place(
        cu_seqlens, segment_sequence, first_segment, T, span, C, BC, PACKED
    )
    if remaining <= span:
        return
    inside = oc < C
    m = tl.where(inside, float("-inf"), 0.0)
    c = tl.zeros([BC], tl.float32)
    rows = tl.arange(0, ROWS)
    for start in range(0, length, ROWS):
        at = (token + start + rows)[:, None] * C + oc[None, :]
        here = (start + rows < length)[:, None] & inside[None, :]
        x = tl.load(logits + at, mask=here, other=float("-inf")).to(tl.float32)
        grown = tl.maximum(m, tl.max(x, axis=0))
        by = subtracted(grown)
        c = c * tl.exp(m - by) + tl.sum(tl.exp(x - by[None, :]), axis=0)
        m = grown
    at = segment.to(tl.int64) * C + oc
    tl.store(largest + at, m, mask=inside)
    tl.store(total + at, c, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "span"])
def abc_forward(
    logits, initial, g, s, final, largest, total, cu_seqlens, segment_sequence, first_segment, T, sequences, span,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, HAS_INITIAL: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """g and s [·, C] of a segment; by its last one, the normalizer after a sequence; grid as above.

    SPLIT: there are several segments a sequence, and `sum_segments` has run.
    """
    if PACKED:
        if tl.program_id(0) // tl.cdiv(C, BC) >= tl.load(first_segment + sequences):
            return
    segment, n, index, token, length, remaining, oc = place(
        cu_seqlens, segment_sequence, first_segment, T, span, C, BC, PACKED
    )
    inside = oc < C
    m = tl.where(inside, float("-inf"), 0.0)
    c = tl.zeros([BC], tl.float32)
    if HAS_INITIAL:
        m = tl.load(initial + n.to(tl.int64) * C + oc, mask=inside, other=0.0)
        c = tl.where(m == float("-inf"), 0.0, 1.0)
    rows = tl.arange(0, ROWS)
    if SPLIT:
        for start in range(0, index, ROWS):
            at = (segment - index + start + rows).to(tl.int64)[:, None] * C + oc[None, :]
            here = (start + rows < index)[:, None] & inside[None, :]
            x = tl.load(largest + at, mask=here, other=float("-inf"))
            parts = tl.load(total + at, mask=here, other=0.0)
            grown = tl.maximum(m, tl.max(x, axis=0))
            by = subtracted(grown)
            c = c * tl.exp(m - by) + tl.sum(parts * tl.exp(x - by[None, :]), axis=0)
            m = grown

    logits, g, s = logits + token * C, g + token * C, s + token * C
    for start in range(0, length, ROWS):
        tokens = ()
        for i in tl.static_range(ROWS):
            tokens += (load_row(logits, start + i, length, oc, float("-inf"), C),)  # type: ignore[assignment]
        # All on their way before the first is used: the compiler does not move loads past a barrier.
        tl.debug_barrier()
        for i in tl.static_range(ROWS):
            x = tokens[i]
            old = c != 0  # true of NaN, which must not pass for nothing
            margin = tl.where(old, (x - m) - tl.log(tl.where(old, c, 1.0)), 0.0)
            at, here = (start + i) * C + oc, oc < tl.where(start + i < length, C, 0)
            tl.store(g + at, tl.where(old, log_sigmoid(-margin), 0.0), mask=here)
            tl.store(s + at, tl.where(old, sigmoid(margin), 1.0), mask=here)
            grown = tl.maximum(m, x)
            by = subtracted(grown)
            c = c * tl.exp(m - by) + tl.exp(x - by)
            m = grown
    if remaining <= span:
        z = tl.where(c != 0, m + tl.log(tl.where(c != 0, c, 1.0)), float("-inf"))
        tl.store(final + n.to(tl.int64) * C + oc, z, mask=inside)


@triton.jit
def load_token(g, s, dg, ds, row, length, oc, C: tl.constexpr):
    """Row `row` of each; 0 from row `length` on, with which `slopes` are 1 and 0."""
    return (
        load_row(g, row, length, oc, 0.0, C), load_row(s, row, length, oc, 0.0, C),
        load_row(dg, row, length, oc, 0.0, C), load_row(ds, row, length, oc, 0.0, C),
    )  # fmt: skip


@triton.jit
def load_segment(decay, value, segment, count, oc, C: tl.constexpr):
    """(D, V) of a segment; (1, 0), which change nothing, from segment `count` on."""
    return load_row(decay, segment, count, oc, 1.0, C), load_row(value, segment, count, oc, 0.0, C)


@triton.jit
def slopes(g, s, dg, ds):
    """(1 - s, dx) of one token."""
    keep = tl.exp(g)
    nothing_before = (s == 1.0) & (g == 0.0)
    return tl.where(nothing_before, 0.0, keep), tl.where(nothing_before, 0.0, s * (keep * ds - dg))


@triton.jit(do_not_specialize=["T", "sequences", "span"])
def sum_segments_backward(
    g, s, dg, ds, decay, value, cu_seqlens, segment_sequence, first_segment, T, sequences, span,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(D, V) [segments, C] of every segment but a sequence's first, alone; grid as forward."""
    if PACKED:
        if tl.program_id(0) // tl.cdiv(C, BC) >= tl.load(first_segment + sequences):
            return
    segment, _, index, token, length, _, oc = place(cu_seqlens, segment_sequence, first_segment, T, span, C, BC, PACKED)
    if index == 0:
        return
    inside = oc < C
    g, s, dg, ds = g + token * C, s + token * C, dg + token * C, ds + token * C
    passed, added = tl.full([BC], 1.0, tl.float32), tl.zeros([BC], tl.float32)
    for start in range((length - 1) // ROWS * ROWS, -1, -ROWS):
        tokens = ()
        for i in tl.static_range(ROWS):
            tokens += load_token(g, s, dg, ds, start + (ROWS - 1 - i), length, oc, C)
        tl.debug_barrier()
        for i in tl.static_range(ROWS):
            keep, dx = slopes(tokens[4 * i], tokens[4 * i + 1], tokens[4 * i + 2], tokens[4 * i + 3])
            added = keep * added - dx
            passed = keep * passed
    at = segment.to(tl.int64) * C + oc
    tl.store(decay + at, passed, mask=inside)
    tl.store(value + at, added, mask=inside)


@triton.jit(do_not_specialize=["T", "sequences", "span"])
def abc_backward(
    g, s, initial, dg, ds, dfinal, dlogits, dinitial, decay, value, cu_seqlens, segment_sequence, first_segment,
    T, sequences, span,
    C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, HAS_INITIAL: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dl [·, C] of a segment; by its first one, the gradient of the normalizer before a sequence; grid as forward."""
    if PACKED:
        if tl.program_id(0) // tl.cdiv(C, BC) >= tl.load(first_segment + sequences):
            return
    segment, n, index, token, length, remaining, oc = place(
        cu_seqlens, segment_sequence, first_segment, T, span, C, BC, PACKED
    )
    inside = oc < C
    g, s, dg, ds, dlogits = g + token * C, s + token * C, dg + token * C, ds + token * C, dlogits + token * C
    at_sequence = n.to(tl.int64) * C + oc
    grown = tl.load(dfinal + at_sequence, mask=inside, other=0.0)
    if SPLIT:
        later = tl.maximum((remaining + span - 1) // span - 1, 0)
        # From the sequence's last segment back to the one after this.
        decay, value = decay + (segment + 1).to(tl.int64) * C, value + (segment + 1).to(tl.int64) * C
        for start in range((later - 1) // ROWS * ROWS, -1, -ROWS):
            parts = ()
            for i in tl.static_range(ROWS):
                parts += load_segment(decay, value, start + (ROWS - 1 - i), later, oc, C)
            tl.debug_barrier()
            for i in tl.static_range(ROWS):
                grown = parts[2 * i] * grown + parts[2 * i + 1]

    for start in range((length - 1) // ROWS * ROWS, -1, -ROWS):
        tokens = ()
        for i in tl.static_range(ROWS):
            tokens += load_token(g, s, dg, ds, start + (ROWS - 1 - i), length, oc, C)
        tl.debug_barrier()
        for i in tl.static_range(ROWS):
            row = start + (ROWS - 1 - i)
            keep, dx = slopes(tokens[4 * i], tokens[4 * i + 1], tokens[4 * i + 2], tokens[4 * i + 3])
            dl = (dx + tokens[4 * i + 1] * grown).to(dlogits.dtype.element_ty)
            tl.store(dlogits + row * C + oc, dl, mask=oc < tl.where(row < length, C, 0))
            grown = keep * grown - dx
    if HAS_INITIAL:
        if index == 0:
            nothing = tl.load(initial + at_sequence, mask=inside, other=0.0) == float("-inf")
            tl.store(dinitial + at_sequence, tl.where(nothing, 0.0, grown), mask=inside)


class Cut:
    """How one call is cut into segments and launched."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor | None):
        B, T, H, M = like.shape
        self.channels, self.device = H * M, like.device
        self.BC = max(16, min(CHANNELS, triton.next_power_of_2(self.channels)))
        blocks = cdiv(self.channels, self.BC)
        shortest = max(SHORTEST, cdiv(B * T * blocks, PROGRAMS), cdiv(T, SEGMENTS))
        span = triton.next_power_of_2(shortest)
        self.split = span < T
        self.parts = Parts(B, T, span, cu_seqlens)
        self.programs = self.parts.count * blocks
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        self.shape = (sequences, H, M)
        cu = None if cu_seqlens is None else cu_seqlens.to(like.device, torch.int32, non_blocking=True)
        self.table = (cu, *self.parts.tables(like.device), T, sequences, span)

    def room(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """For two numbers a segment and channel."""
        if not self.split:
            return None, None
        first, second = like.new_empty(2, self.parts.count, self.channels, dtype=torch.float32)
        return first, second

    def launch(self, kernel, rows: int, *arguments, **constants) -> None:
        constants |= {"C": self.channels, "BC": self.BC, "ROWS": rows, "PACKED": self.table[0] is not None}
        run(kernel, self.programs, (*arguments, *self.table), constants, warps=1)


def cut_for(like: Tensor, cu_seqlens: Tensor | None) -> Cut:
    """The cut of a call, kept as plans are."""
    return kept(_cuts, (like.shape, like.device), like.device, cu_seqlens, lambda own: Cut(like, own))


_cuts: dict[tuple, Cut] = {}


def abc_gates(logits: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(g, s, the normalizer after each sequence): differentiable; logits [B, T, H, M], initial [N, H, M] float32."""
    logits, initial = logits.contiguous(), None if initial is None else initial.contiguous()
    if torch.compiler.is_compiling():
        return abc_op(logits, initial, cu_seqlens)
    if differentiated(logits, initial):
        return _Abc.apply(logits, initial, cu_seqlens)
    return forward_pass(cut_for(logits, cu_seqlens), logits, initial)


def forward_pass(cut: Cut, logits: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """g, s and the last normalizers."""
    g, s = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
    final = logits.new_empty(cut.shape, dtype=torch.float32)
    sums = cut.room(logits)
    with torch.cuda.device_of(logits):
        if cut.split:
            cut.launch(sum_segments, ROWS, logits, *sums)
        cut.launch(
            abc_forward, ROWS, logits, initial, g, s, final, *sums, HAS_INITIAL=initial is not None, SPLIT=cut.split
        )
    return g, s, final


def backward_pass(
    cut: Cut, g: Tensor, s: Tensor, initial: Tensor | None, outgoing: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits, in `dtype`, and of the initial normalizers, from dg, ds and that of the last ones."""
    dg, ds, dfinal = (x.contiguous() for x in outgoing)
    dlogits, dinitial = torch.empty_like(g, dtype=dtype), None if initial is None else torch.empty_like(initial)
    sums = cut.room(g)
    with torch.cuda.device_of(g):
        if cut.split:
            cut.launch(sum_segments_backward, BACKWARD_ROWS, g, s, dg, ds, *sums)
        cut.launch(
            abc_backward, BACKWARD_ROWS, g, s, initial, dg, ds, dfinal, dlogits, dinitial, *sums,
            HAS_INITIAL=initial is not None, SPLIT=cut.split,
        )  # fmt: skip
    return dlogits, dinitial


class _Abc(Function):
    @staticmethod
    def forward(ctx, logits, initial, cu_seqlens):
        cut = cut_for(logits, cu_seqlens)
        g, s, final = forward_pass(cut, logits, initial)
        ctx.save_for_backward(g, s, initial, cu_seqlens)
        ctx.cut, ctx.dtype = cut, logits.dtype
        return g, s, final

    @staticmethod
    @once_differentiable
    def backward(ctx, *outgoing):
        g, s, initial, _ = ctx.saved_tensors
        return *backward_pass(ctx.cut, g, s, initial, list(outgoing), ctx.dtype), None


@torch.library.custom_op("flash_gsa::abc_gates", mutates_args=())
def abc_op(logits: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_pass` for torch.compile."""
    return forward_pass(cut_for(logits, cu_seqlens), logits, initial)


@abc_op.register_fake
def _(logits, initial, cu_seqlens):
    sequences = logits.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    g, s = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
    return g, s, logits.new_empty(sequences, *logits.shape[2:], dtype=torch.float32)


@torch.library.custom_op("flash_gsa::abc_gates_backward", mutates_args=())
def abc_backward_op(
    g: Tensor,
    s: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    outgoing: list[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`backward_pass` for torch.compile; an absent gradient is an empty tensor."""
    dlogits, dinitial = backward_pass(cut_for(g, cu_seqlens), g, s, initial, outgoing, dtype)
    return dlogits, g.new_empty(0) if dinitial is None else dinitial


@abc_backward_op.register_fake
def _(g, s, initial, cu_seqlens, outgoing, dtype):
    return torch.empty_like(g, dtype=dtype), g.new_empty(0) if initial is None else torch.empty_like(initial)


def _save(ctx, inputs, output) -> None:
    logits, initial, cu_seqlens = inputs
    ctx.save_for_backward(*output[:2], initial, cu_seqlens)
    ctx.dtype = logits.dtype


def _gradients(ctx, *outgoing):
    g, s, initial, cu_seqlens = ctx.saved_tensors
    dlogits, dinitial = abc_backward_op(g, s, initial, cu_seqlens, list(outgoing), ctx.dtype)
    return dlogits, None if initial is None else dinitial, None


abc_op.register_autograd(_gradients, setup_context=_save)
