"""The Triton backend: launches, gradients, and when it can run."""

import torch
from torch import Tensor

from ..registry import Backend, Problem

try:
    import triton
    import triton.language as tl

    from . import backward, forward, gates
    from .step import triton_step
except ImportError:  # torch's CPU build brings no Triton
    triton = triton_step = None

from . import tiles as _tiles

# Largest exponent of a gate factor: e^60 leaves float32 and bfloat16 room for the sums of its products.
RANGE = 60.0
# Programs that keep every multiprocessor busy; long sequences are cut into segments until there are as many.
FILLING = 512
MAX_HEAD, MAX_SLOTS = 512, 256


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run `problem`, or None."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if problem.device != "cuda" and not _interpreted():
        return f"its kernels run on CUDA devices, not on {problem.device!r} (or under TRITON_INTERPRET=1)"
    if problem.dtype == torch.float64:
        return "it has no float64"
    if max(problem.K, problem.V) > MAX_HEAD:
        return f"head dimensions above {MAX_HEAD} (K = {problem.K}, V = {problem.V})"
    if problem.M > MAX_SLOTS:
        return f"more than {MAX_SLOTS} slots (M = {problem.M})"
    return None


def _interpreted() -> bool:
    return triton is not None and bool(triton.knobs.runtime.interpret)


def triton_forward(q, k, v, g, s, scale, initial_state, output_final_state, cu_seqlens):
    """`gated_slot_attention` by Triton kernels; arguments as there, already validated."""
    hk0, hv0 = (None, None) if initial_state is None else initial_state
    hk0 = None if hk0 is None else hk0.transpose(2, 3)
    o, hkT, hvT = _Function.apply(q, k, v, g, s, hk0, hv0, cu_seqlens, scale, output_final_state)
    return o, (hkT.transpose(2, 3), hvT) if output_final_state else None


class _Parts:
    """Sequences cut into stretches of `span` tokens: how many, and for packed sequences which is whose.

    For packed sequences `count` is an upper bound that needs no look at the lengths; surplus programs return at once.
    An empty sequence has one part if `at_least_one`.
    """

    def __init__(self, B: int, T: int, span: int, cu_seqlens: Tensor | None, at_least_one: bool = False):
        if cu_seqlens is None:
            self.count = B * triton.cdiv(T, span)
            self.sequence = self.first = None
            return
        sequences = cu_seqlens.numel() - 1
        self.count = T // span + sequences
        parts = (cu_seqlens.diff() + span - 1) // span
        if at_least_one:
            parts = parts.clamp(min=1)
        first = torch.zeros(sequences + 1, dtype=torch.int32, device=parts.device)
        torch.cumsum(parts, 0, out=first[1:])
        index = torch.arange(self.count, dtype=torch.int32, device=parts.device)
        self.first = first
        self.sequence = torch.searchsorted(first[1:], index, right=True, out_int32=True).clamp_(max=sequences - 1)

    def to(self, device: torch.device) -> "_Parts":
        if self.first is not None:
            self.first = self.first.to(device, non_blocking=True)
            self.sequence = self.sequence.to(device, non_blocking=True)
        return self


class _Plan:
    """How one call is cut: chunks, segments, tile sizes, compile-time constants.

    `linear`: gated linear attention, which is the second pass alone: q takes the place of p and k that of s, over
    M = K slots, so that there are no keys left: K = 0.
    """

    def __init__(self, q, k, v, g, has_s: bool, cu_seqlens: Tensor | None, linear: bool = False):
        self.B, self.T, self.HQ, K = q.shape
        self.K = 0 if linear else K
        self.H, self.V, self.M = k.shape[2], v.shape[3], g.shape[3]
        self.R = self.HQ // self.H
        self.tiles = _tiles.choose(q.dtype, self.K, self.V, self.M, self.R)
        C = self.tiles.C
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.numel() - 1
        self.chunks = _Parts(self.B, self.T, C, cu_seqlens).to(q.device)
        slices = self.slices(self.tiles.states)
        # At least 8 chunks a segment: cutting costs one more pass over the inputs.
        span = max(8, triton.cdiv(triton.cdiv(self.B * self.T, C) * self.H * slices, FILLING))
        self.segment_chunks = min(span, triton.cdiv(self.T, C))
        self.split = self.segment_chunks * C < self.T
        self.segments = _Parts(self.B, self.T, self.segment_chunks * C, cu_seqlens, at_least_one=True).to(q.device)
        self.cu = None if cu_seqlens is None else cu_seqlens.to(q.device, torch.int32, non_blocking=True)
        half = q.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if half else torch.float32
        self.sum_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
        self.sizes = {
            "H": self.H,
            "M": self.M,
            "C": C,
            "BM": max(16, triton.next_power_of_2(self.M)),
            "PACKED": cu_seqlens is not None,
        }
        self.widths = {
            "K": self.K,
            "V": self.V,
            # float16 has too little range for e^{±G}; its products with gates are done in TF32, of equal precision.
            "DOT": tl.bfloat16 if half else tl.float32,
            "PRECISION": "tf32" if q.dtype in (torch.bfloat16, torch.float16) else "ieee",
        }
        self.near = {"RANGE": RANGE, "HAS_S": has_s, "SLICES": self.sizes["BM"] // 16}
        self.linear = {"LINEAR": linear}

    def slices(self, tile) -> int:
        """Programs that share a head's states in a walk."""
        return triton.cdiv(self.K, tile.BD) + triton.cdiv(self.V, tile.BD)

    def states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both states at every chunk."""
        return self._pair(like, self.chunks.count, self.state_dtype)

    def boundary_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both states of every sequence, before its first token or after its last: float32."""
        return self._pair(like, self.sequences, torch.float32)

    def _pair(self, like: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            like.new_empty(count, self.H, self.M, self.K, dtype=dtype),
            like.new_empty(count, self.H, self.M, self.V, dtype=dtype),
        )

    @property
    def chunk_table(self):
        """What a kernel over chunks needs to find its tokens."""
        return self.cu, self.chunks.sequence, self.chunks.first, self.T, self.sequences

    def prepare(self, g: Tensor, s: Tensor | None) -> tuple[Tensor, ...]:
        """until, shrunk, kept, level, levels: see `gates.prepare`."""
        shape = g.shape
        until = g.new_empty(shape, dtype=self.sum_dtype)
        shrunk, kept = (g.new_empty(shape, dtype=self.state_dtype) for _ in range(2))
        level = g.new_empty(shape, dtype=torch.int8)
        levels = g.new_empty(self.chunks.count, self.H, self.near["SLICES"], dtype=torch.int32)
        gates.prepare[(levels.numel(),)](
            g, g if s is None else s, until, shrunk, kept, level, levels, *self.chunk_table,
            **{name: size for name, size in self.sizes.items() if name != "BM"}, **self.near, num_warps=1,
        )  # fmt: skip
        return until, shrunk, kept, level, levels

    def walk(self, kernel, tile, like: Tensor, arguments, **options) -> None:
        """Launch a walk over segments; where a sequence has several, first for what each of them adds alone."""
        slices = self.slices(tile)
        grid = (self.segments.count * self.H * slices,)
        table = (self.cu, self.segments.sequence, self.segments.first, self.chunks.first, self.T, self.sequences)
        options |= self.sizes | self.widths | {"CHUNKS": self.segment_chunks, "BD": tile.BD}
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
        local = (None, None, None)
        if self.split:
            decay = like.new_empty(self.segments.count, self.H, self.M, dtype=torch.float32)
            local = (*self._pair(like, self.segments.count, torch.float32), decay)
            kernel[grid](*arguments, *local, *table, **options, LOCAL=True, SPLIT=False)
        kernel[grid](*arguments, *local, *table, **options, LOCAL=False, SPLIT=self.split)

    def launch(self, kernel, tile, programs: int, *arguments, **constants) -> None:
        """Launch a kernel over chunks and heads."""
        kernel[(self.chunks.count * programs,)](
            *arguments, *self.chunk_table, **self.sizes, **self.widths, **self.near, **constants,
            R=self.R, BD=tile.BD, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def forward_pass(q, k, v, g, s, hk0, hv0, cu_seqlens, scale: float, want_final: bool, keep: bool):
    """(o, (hkT, hvT) or (None, None), what the backward needs): one forward of contiguous tensors."""
    plan = _Plan(q, k, v, g, s is not None, cu_seqlens)
    strength = g if s is None else s
    until, shrunk, kept, level, levels = plan.prepare(g, strength)
    hk, hv = plan.states(q)
    final = plan.boundary_states(q) if want_final else (None, None)
    plan.walk(
        forward.states_forward, plan.tiles.states, q, (k, v, kept, until, hk0, hv0, hk, hv, *final),
        HAS_INITIAL=hk0 is not None, WANT_FINAL=want_final,
    )  # fmt: skip
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    p = q.new_empty(plan.B, plan.T, plan.HQ, plan.M, dtype=plan.state_dtype) if keep else None
    lse = q.new_empty(plan.B, plan.T, plan.HQ, dtype=torch.float32) if keep else None
    plan.launch(
        forward.outputs, plan.tiles.outputs, plan.HQ,
        q, k, v, g, strength, until, shrunk, level, levels, hk, hv, o, p, lse, scale=scale, KEEP=keep, **plan.linear,
    )  # fmt: skip
    return o, final, (until, shrunk, kept, level, levels, hk, hv, p, lse)


def backward_pass(q, k, v, g, s, hk0, saved, do, dhkT, dhvT, cu_seqlens, scale: float):
    """Gradients of q, k, v, g, s and the initial states."""
    until, shrunk, kept, level, levels, hk, hv, p, lse = saved
    plan = _Plan(q, k, v, g, s is not None, cu_seqlens)
    strength = g if s is None else s
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dl, read_p, read_dl = (torch.empty_like(p) for _ in range(3))
    dgate = torch.empty_like(g, dtype=torch.float32)
    dwrite = None if s is None else torch.empty_like(dgate)
    plan.launch(
        backward.values_backward, plan.tiles.values_backward, plan.H,
        q, v, g, strength, until, shrunk, level, levels, hv, p, lse, do, dq, dl, read_p, read_dl, dgate, dwrite,
        scale=1.0, **plan.linear,
    )  # fmt: skip
    plan.launch(
        backward.queries_backward, plan.tiles.queries_backward, plan.H,
        q, k, g, strength, until, shrunk, level, levels, hk, dl, read_dl, dq, dgate, dwrite, scale=scale,
    )  # fmt: skip
    dhk, dhv = plan.states(q)
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    initial = plan.boundary_states(q) if hk0 is not None else (None, None)
    plan.walk(
        backward.states_backward, plan.tiles.states_backward, q,
        (q, do, until, read_p, read_dl, hk, hv, dhkT, dhvT, dhk, dhv, passed, *initial),
        HAS_FINAL=dhkT is not None, WANT_INITIAL=hk0 is not None, R=plan.R, key_scale=scale, value_scale=1.0,
    )  # fmt: skip
    plan.launch(
        backward.keys_backward, plan.tiles.keys_backward, plan.H,
        q, k, v, g, strength, until, shrunk, kept, level, levels, do, p, dl, read_p, read_dl, dwrite, passed,
        dhk, dhv, dk, dv, dwrite, dgate, key_scale=scale, value_scale=1.0, PARTS=parts, **plan.linear,
    )  # fmt: skip
    ds = None if s is None else dwrite.to(s.dtype)
    return dq, dk, dv, dgate.to(g.dtype), ds, *initial


def linear_forward_pass(q, k, v, g, h0, cu_seqlens, scale: float, want_final: bool):
    """(o, hT or None, what the backward needs) of gated linear attention; contiguous tensors."""
    plan = _Plan(q, k, v, g, True, cu_seqlens, linear=True)
    until, shrunk, kept, level, levels = plan.prepare(g, k)
    h = plan.states(q)[1]
    hT = plan.boundary_states(q)[1] if want_final else None
    plan.walk(
        forward.states_forward, plan.tiles.states, q, (v, v, kept, until, h0, h0, h, h, hT, hT),
        HAS_INITIAL=h0 is not None, WANT_FINAL=want_final,
    )  # fmt: skip
    o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
    plan.launch(
        forward.outputs, plan.tiles.outputs, plan.HQ,
        q, v, v, g, k, until, shrunk, level, levels, h, h, o, None, None, scale=scale, KEEP=False, **plan.linear,
    )  # fmt: skip
    return o, hT, (until, shrunk, kept, level, levels, h)


def linear_backward_pass(q, k, v, g, h0, saved, do, dhT, cu_seqlens, scale: float):
    """Gradients of q, k, v, g and the initial state."""
    until, shrunk, kept, level, levels, h = saved
    plan = _Plan(q, k, v, g, True, cu_seqlens, linear=True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    read = torch.empty_like(q, dtype=plan.state_dtype)
    dgate, dwrite = (torch.empty_like(g, dtype=torch.float32) for _ in range(2))
    plan.launch(
        backward.values_backward, plan.tiles.values_backward, plan.H,
        q, v, g, k, until, shrunk, level, levels, h, None, None, do, dq, None, read, None, dgate, dwrite,
        scale=scale, **plan.linear,
    )  # fmt: skip
    dh = torch.empty_like(h)
    parts = plan.slices(plan.tiles.states_backward)
    passed = q.new_empty(plan.chunks.count, plan.H, parts, plan.M, dtype=torch.float32)
    dh0 = None if h0 is None else plan.boundary_states(q)[1]
    plan.walk(
        backward.states_backward, plan.tiles.states_backward, q,
        (do, do, until, read, read, h, h, dhT, dhT, dh, dh, passed, dh0, dh0),
        HAS_FINAL=dhT is not None, WANT_INITIAL=h0 is not None, R=plan.R, key_scale=scale, value_scale=scale,
    )  # fmt: skip
    plan.launch(
        backward.keys_backward, plan.tiles.keys_backward, plan.H,
        do, v, v, g, k, until, shrunk, kept, level, levels, do, q, q, read, read, dwrite, passed,
        dh, dh, dv, dv, dk, dgate, key_scale=scale, value_scale=scale, PARTS=parts, **plan.linear,
    )  # fmt: skip
    return dq, dk, dv, dgate.to(g.dtype), dh0


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final):
        q, k, v, g, s, hk0, hv0 = (None if x is None else x.contiguous() for x in (q, k, v, g, s, hk0, hv0))
        keep = any(ctx.needs_input_grad)
        o, final, saved = forward_pass(q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final, keep)
        if keep:
            ctx.save_for_backward(q, k, v, g, s, hk0, cu_seqlens, *saved)
        ctx.scale = scale
        return o, *final

    @staticmethod
    def backward(ctx, do, dhkT, dhvT):
        q, k, v, g, s, hk0, cu_seqlens, *saved = ctx.saved_tensors
        do, dhkT, dhvT = (None if x is None else x.contiguous() for x in (do, dhkT, dhvT))
        gradients = backward_pass(q, k, v, g, s, hk0, saved, do, dhkT, dhvT, cu_seqlens, ctx.scale)
        return *gradients, None, None, None


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, h0, cu_seqlens, scale, want_final):
        q, k, v, g, h0 = (None if x is None else x.contiguous() for x in (q, k, v, g, h0))
        o, hT, saved = linear_forward_pass(q, k, v, g, h0, cu_seqlens, scale, want_final)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, g, h0, cu_seqlens, *saved)
        ctx.scale = scale
        return o, hT

    @staticmethod
    def backward(ctx, do, dhT):
        q, k, v, g, h0, cu_seqlens, *saved = ctx.saved_tensors
        do, dhT = (None if x is None else x.contiguous() for x in (do, dhT))
        return *linear_backward_pass(q, k, v, g, h0, saved, do, dhT, cu_seqlens, ctx.scale), None, None, None


def triton_linear_forward(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """`gated_linear_attention` by the kernels of the second pass; arguments as there, already validated."""
    return _LinearFunction.apply(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state)


BACKEND = Backend(
    name="triton",
    forward=triton_forward,
    unsupported=unsupported,
    priority=20,
    step=triton_step,
    linear_forward=triton_linear_forward,
)
