"""One token of gated linear attention in one launch: each number of the state is read once and written once.

    S = α ∘ S + k ⊗ v     o = scale · Sᵀ q     α = e^g

A column of S and its number of o need no other column. So a key/value head of a sequence is cut by columns among P
programs, which have nothing to tell each other. The R query heads of a group read the state while it is in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..once import differentiated
from ..reference_linear import reference_linear_step
from .launching import run
from .step import MOST_AT_ONCE, Split, by_rows, cut, processors_of, rows_apart
from .step_slots import load_rows, store_rows

NARROWEST = 32
"""Columns of a program, at least: 128 bytes of a row."""


@triton.jit
def step_linear(
    q, k, v, g, state, new, o, q_b, k_b, v_b, g_b, state_b, state_h, state_k, scale, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    APART: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, ONE_GATE: tl.constexpr,
):  # fmt: skip
    """BV columns of one group, by tiles of BK rows; grid (B·H·P,). x_b, x_h, … are strides.

    q [B, H·R, K], k [B, H, K], v [B, H, V], g [B, H, K], or [B, H, 1] where there is ONE_GATE, state [B, H, K, V] →
    o [B, H·R, V], new. APART: as in `step_slots`.
    """
    program = tl.program_id(0).to(tl.int64)
    group, part = program // P, (program % P).to(tl.int32)
    b, h = group // H, group % H
    q += b * q_b + h * R * K
    k += b * k_b + h * K
    state += b * state_b + h * state_h
    new += b * state_b + h * state_h
    ov = part * BV + tl.arange(0, BV)
    value = tl.load(v + b * v_b + h * V + ov, mask=ov < V, other=0.0).to(tl.float32)
    reads = ()
    for _ in tl.static_range(R):
        reads += (tl.zeros((APART, BV), tl.float32),)  # type: ignore[assignment]
    for tile in tl.range(0, TILES, num_stages=STAGES):
        ok = tile * BK + tl.arange(0, BK)
        rows = load_rows(state, state_k, ok, ov, K, V, TILES * BK, P * BV).to(tl.float32)
        if ONE_GATE:
            decay = tl.exp(tl.load(g + b * g_b + h + ok * 0).to(tl.float32))
        else:
            decay = tl.exp(tl.load(g + b * g_b + h * K + ok, mask=ok < K, other=0.0).to(tl.float32))
        key = tl.load(k + ok, mask=ok < K, other=0.0).to(tl.float32)
        rows = rows * decay[:, None] + key[:, None] * value[None, :]
        store_rows(rows, new, state_k, ok, ov, K, V, TILES * BK, P * BV)
        new_reads = ()
        for r in tl.static_range(R):
            query = tl.load(q + r * K + ok, mask=ok < K, other=0.0).to(tl.float32)
            read = tl.reshape(rows * query[:, None], (BK // APART, APART, BV))
            new_reads += (reads[r] + tl.sum(read, axis=0),)  # type: ignore[assignment]
        reads = new_reads
    for r in tl.static_range(R):
        read = scale * tl.sum(reads[r], axis=0)
        tl.store(o + (group * R + r) * V + ov, read.to(o.dtype.element_ty), mask=ov < V)


def choose(groups: int, V: int, R: int, processors: int) -> Split:
    """How `groups` heads are spread over a chip of `processors` multiprocessors.

    Times are µs a layer on one H100 (132 multiprocessors), B sequences: RetNet has 8 heads of 256 × 512, HGRN2 16 of
    128 × 128.
    """
    # A program of few columns has them of many rows at once. RetNet, B 256: 64 columns 735, all of them 761; HGRN2,
    # B 64: 50.4 and 54.4. Half as many columns where heads are few: RetNet, B 4, 14.7 instead of 15.6.
    few = groups * triton.cdiv(V, 2 * NARROWEST) < 3 * processors
    programs = triton.cdiv(V, NARROWEST if few else 2 * NARROWEST)
    # One query head: half as many numbers, RetNet, B 64, 192.1 instead of 190.6. Several: where programs alone fill the
    # chip one warp does, 4 of 128 to each of 8 heads, B 64, 27.8, with four warps 34.5; but B 4, 8.0 and 5.7. 8 to each
    # of 2 heads of 256 × 512, B 64, 53.3 with 512 numbers, 55.3 with 1,024.
    tile, warps = (2048, 4) if R == 1 or few else (1024 if R <= 4 else 512, 1)
    # RetNet, B 256: six stages 735, four 744. Several query heads, B 64: six 32.6, four 31.8.
    return Split(programs, tile, warps, stages=6 if R == 1 else 4)


def triton_linear_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention_step` as one launch; arguments as there, already validated.

    q [B, HQ, K], k, g [B, H, K], v [B, H, V], state [B, H, K, V] → o [B, HQ, V] and the new state. Where a gradient is
    wanted, or more than `MOST_AT_ONCE` query heads read a state, the reference computes the step.
    """
    if differentiated(q, k, v, g, state) or q.shape[1] > MOST_AT_ONCE * k.shape[1]:
        return reference_linear_step(q, k, v, g, state, scale)
    return (_op if torch.compiler.is_compiling() else step)(q, k, v, g, state, float(scale))


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and the new state."""
    state = state.contiguous()
    new = torch.empty_like(state)
    return launch(q, k, v, g, state, new, scale), new


# What torch.compile sees of a step: one opaque operation, without a break of its graph.
_op = torch.library.custom_op("flash_gsa::linear_step", step, mutates_args=())


@_op.register_fake
def _(q, k, v, g, state, scale):
    return q.new_empty(*q.shape[:2], v.shape[2]), torch.empty_like(state, memory_format=torch.contiguous_format)


def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, new: Tensor, scale: float, split: Split | None = None
) -> Tensor:
    """o; the state after the token is written to `new`, which has the strides of `state` or is it."""
    B, HQ, K = q.shape
    H, V = v.shape[1:]
    R, groups = HQ // H, B * H
    o = q.new_empty(B, HQ, V)
    if groups == 0:
        return o
    split = choose(groups, V, R, processors_of(q.device)) if split is None else split
    one_gate = g.stride(2) == 0 and K > 1
    q, k, v, g = (by_rows(x) for x in (q, k, v, g[..., :1] if one_gate else g))
    P = split.programs
    BV = triton.next_power_of_2(triton.cdiv(V, P))
    BK, TILES = cut(K, max(1, split.tile // BV))
    constants = {"K": K, "V": V, "R": R, "P": P, "BK": BK, "BV": BV, "TILES": TILES, "ONE_GATE": one_gate}
    constants["APART"] = rows_apart(BK, BV, split.warps, state.element_size())
    constants["STAGES"] = min(split.stages, TILES + 1)
    strides = [x.stride(0) for x in (q, k, v, g, state)]
    with torch.cuda.device_of(q):
        arguments = (q, k, v, g, state, new, o, *strides, *state.stride()[1:3], scale, H)
        run(step_linear, groups * P, arguments, constants, split.warps)
    return o
