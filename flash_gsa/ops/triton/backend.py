"""The Triton backend: launches, gradients, and when it can run."""

import torch
from torch import Tensor

from ..registry import Backend, Problem

try:
    import triton
    import triton.language as tl

    from . import backward, forward
except ImportError:  # torch's CPU build brings no Triton
    triton = None

from . import tiles as _tiles

RANGE = 60.0
MAX_HEAD, MAX_SLOTS = 512, 256


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot run `problem`, or None."""
    if triton is None:
        return "triton is not installed (pip install triton)"
    if not _interpreted():
        return "its kernels run in Triton's interpreter (TRITON_INTERPRET=1) until they are verified on GPUs"
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


class _Plan:
    """How one call is cut: chunks, their sequences, tile sizes, compile-time constants."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, cu_seqlens: Tensor | None):
        self.B, self.T, self.HQ, self.K = q.shape
        self.H, self.V, self.M = k.shape[2], v.shape[3], g.shape[3]
        self.tiles = _tiles.choose(q.dtype, self.K, self.V, self.M)
        C = self.tiles.C
        if cu_seqlens is None:
            self.sequences, self.chunks = self.B, self.B * triton.cdiv(self.T, C)
            self.cu = self.sequence = self.first = None
        else:
            self.sequences = cu_seqlens.numel() - 1
            # An upper bound that needs no look at the lengths; surplus programs return at once.
            self.chunks = self.T // C + self.sequences
            count = (cu_seqlens.diff() + C - 1) // C
            first = torch.zeros(self.sequences + 1, dtype=torch.int32, device=count.device)
            torch.cumsum(count, 0, out=first[1:])
            index = torch.arange(self.chunks, dtype=torch.int32, device=count.device)
            sequence = torch.searchsorted(first[1:], index, right=True, out_int32=True).clamp_(max=self.sequences - 1)
            self.cu, self.sequence, self.first = (
                x.to(q.device, torch.int32, non_blocking=True) for x in (cu_seqlens, sequence, first)
            )
        half = q.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if half else torch.float32
        self.constants = {
            "H": self.H,
            "K": self.K,
            "V": self.V,
            "M": self.M,
            "C": C,
            "BM": max(16, triton.next_power_of_2(self.M)),
            "PACKED": cu_seqlens is not None,
            # float16 has too little range for e^{±G}; its products with gates are done in TF32, of equal precision.
            "DOT": tl.bfloat16 if half else tl.float32,
            "PRECISION": "tf32" if q.dtype in (torch.bfloat16, torch.float16) else "ieee",
        }
        self.R = self.HQ // self.H

    def states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both states at every chunk."""
        return (
            like.new_empty(self.chunks, self.H, self.M, self.K, dtype=self.state_dtype),
            like.new_empty(self.chunks, self.H, self.M, self.V, dtype=self.state_dtype),
        )

    def boundary_states(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both states of every sequence, before its first token or after its last: float32."""
        shape = (self.sequences, self.H, self.M)
        return (
            like.new_empty(*shape, self.K, dtype=torch.float32),
            like.new_empty(*shape, self.V, dtype=torch.float32),
        )

    def launch(self, kernel, tile, grid, *arguments, **constants):
        slices = triton.cdiv(self.K, tile.BD) + triton.cdiv(self.V, tile.BD)
        programs = {
            "slices": (slices, self.sequences * self.H),
            "queries": (self.chunks * self.HQ,),
            "keys": (self.chunks * self.H,),
        }
        kernel[programs[grid]](
            *arguments, **self.constants, **constants, BD=tile.BD, num_warps=tile.warps, num_stages=tile.stages
        )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, s, hk0, hv0, cu_seqlens, scale, want_final):
        q, k, v, g, s, hk0, hv0 = (None if x is None else x.contiguous() for x in (q, k, v, g, s, hk0, hv0))
        plan = _Plan(q, k, v, g, s, cu_seqlens)
        hk, hv = plan.states(q)
        final = plan.boundary_states(q) if want_final else (None, None)
        plan.launch(
            forward.states_forward, plan.tiles.states, "slices",
            k, v, g, s, hk0, hv0, hk, hv, *final, plan.cu, plan.first, plan.T,
            HAS_S=s is not None, HAS_INITIAL=hk0 is not None, WANT_FINAL=want_final,
        )  # fmt: skip
        o = q.new_empty(plan.B, plan.T, plan.HQ, plan.V)
        keep = any(ctx.needs_input_grad)
        logits = q.new_empty(plan.B, plan.T, plan.HQ, plan.M, dtype=torch.float32) if keep else None
        plan.launch(
            forward.outputs, plan.tiles.outputs, "queries",
            q, k, v, g, s, hk, hv, o, logits, plan.cu, plan.sequence, plan.first, plan.T, plan.sequences, scale,
            R=plan.R, HAS_S=s is not None, KEEP_LOGITS=keep, RANGE=RANGE,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, g, s, hk0, hk, hv, logits)
        ctx.plan, ctx.scale = plan, scale
        return o, *final

    @staticmethod
    def backward(ctx, do, dhkT, dhvT):
        q, k, v, g, s, hk0, hk, hv, logits = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        do = do.contiguous()
        has_final = dhkT is not None
        if has_final:
            dhkT, dhvT = dhkT.contiguous(), dhvT.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        p = torch.empty_like(logits, dtype=plan.state_dtype)
        dl = torch.empty_like(p)
        dgate = torch.empty_like(logits)
        plan.launch(
            backward.queries_backward, plan.tiles.queries_backward, "queries",
            q, k, v, g, s, hk, hv, logits, do, dq, p, dl, dgate, plan.cu, plan.sequence, plan.first, plan.T,
            plan.sequences, scale, HAS_S=s is not None, RANGE=RANGE, R=plan.R,
        )  # fmt: skip
        dhk, dhv = plan.states(q)
        want_initial = hk0 is not None
        initial = plan.boundary_states(q) if want_initial else (None, None)
        plan.launch(
            backward.states_backward, plan.tiles.states_backward, "slices",
            q, do, g, p, dl, dhkT, dhvT, dhk, dhv, *initial, plan.cu, plan.first, plan.T, scale,
            HAS_FINAL=has_final, WANT_INITIAL=want_initial, R=plan.R,
        )  # fmt: skip
        dg = torch.empty_like(g, dtype=torch.float32)
        ds = None if s is None else torch.empty_like(dg)
        plan.launch(
            backward.keys_backward, plan.tiles.keys_backward, "keys",
            q, k, v, g, s, hk, hv, do, p, dl, dgate, dhk, dhv, dk, dv, ds, dg, plan.cu, plan.sequence, plan.first,
            plan.T, plan.sequences, scale, HAS_S=s is not None, RANGE=RANGE, R=plan.R,
        )  # fmt: skip
        return dq, dk, dv, dg.to(g.dtype), None if ds is None else ds.to(s.dtype), *initial, None, None, None


BACKEND = Backend(name="triton", forward=triton_forward, unsupported=unsupported, priority=20)
