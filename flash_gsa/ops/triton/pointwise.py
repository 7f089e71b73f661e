"""Activations, gates and norms of a block, each one kernel forward and one backward; sums in float32.

With σ the logistic function, SiLU a(x) = x σ(x) has the derivative a'(x) = σ(x) (1 + x (1 - σ(x))).
The backward of each function reads its input again instead of anything kept between: formulas at the kernels.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from ..once import differentiated, once_differentiable
from ..products import product_dtype
from .launching import run
from .plan import cdiv

# Numbers of one tensor that 4 warps hold: in 16 bits two loads of 16 bytes a thread. A wider row gets more warps.
TILE = 2048
# Programs that share the rows of a norm's backward; each adds up its part of the weight's gradient. The same number on
# every device, so that the sum has the same bits on all of them.
SHARES = 512
# Groups of rows on their way to such a program.
STAGES = 2


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):
    """The derivative of x σ(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def log_sigmoid(x):
    """log σ(x) = min(x, 0) - log(1 + e^-|x|), with all its digits also where e^-|x| is far below 1.

    log(1 + e) = 2 artanh(z) for z = e / (2 + e) ≤ 1/3, as a series that stops where float32 does.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    w = z * z
    series = 1.0 + w * (1.0 / 3 + w * (1.0 / 5 + w * (1.0 / 7 + w * (1.0 / 9 + w * (1.0 / 11 + w * (1.0 / 13))))))
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def _silu_tile(x, y, block, size, TILE: tl.constexpr):
    at = block.to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, (value * sigmoid(value)).to(y.dtype.element_ty), mask=at < size)


@triton.jit
def _silu_tile_backward(x, dy, dx, block, size, TILE: tl.constexpr):
    at = block.to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    grown = tl.load(dy + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(dx + at, (grown * silu_slope(value)).to(dx.dtype.element_ty), mask=at < size)


@triton.jit
def silu_forward(q, k, v, q_out, k_out, v_out, q_size, k_size, v_size, TILE: tl.constexpr):
    """x σ(x) of three tensors; grid (their tiles one after the other,)."""
    block = tl.program_id(0)
    q_tiles, k_tiles = tl.cdiv(q_size, TILE), tl.cdiv(k_size, TILE)
    if block < q_tiles:
        _silu_tile(q, q_out, block, q_size, TILE)
    else:
        if block < q_tiles + k_tiles:
            _silu_tile(k, k_out, block - q_tiles, k_size, TILE)
        else:
            _silu_tile(v, v_out, block - q_tiles - k_tiles, v_size, TILE)


@triton.jit
def silu_backward(q, k, v, dq_out, dk_out, dv_out, dq, dk, dv, q_size, k_size, v_size, TILE: tl.constexpr):
    """dx = a'(x) dy of three tensors; grid as forward."""
    block = tl.program_id(0)
    q_tiles, k_tiles = tl.cdiv(q_size, TILE), tl.cdiv(k_size, TILE)
    if block < q_tiles:
        _silu_tile_backward(q, dq_out, dq, block, q_size, TILE)
    else:
        if block < q_tiles + k_tiles:
            _silu_tile_backward(k, dk_out, dk, block - q_tiles, k_size, TILE)
        else:
            _silu_tile_backward(v, dv_out, dv, block - q_tiles - k_tiles, v_size, TILE)


@triton.jit
def swiglu_forward(gate, up, product, size, TILE: tl.constexpr):
    """a(gate) ∘ up; grid (tiles,)."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(product + at, (value * sigmoid(value) * factor).to(product.dtype.element_ty), mask=at < size)


@triton.jit
def swiglu_backward(gate, up, dproduct, dgate, dup, product, size, TILE: tl.constexpr, AGAIN: tl.constexpr):
    """dgate = a'(gate) up ∘ dproduct, dup = a(gate) ∘ dproduct; with AGAIN also the product, which may be dproduct."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    grown = tl.load(dproduct + at, mask=at < size, other=0.0).to(tl.float32)
    a = value * sigmoid(value)
    tl.store(dgate + at, (silu_slope(value) * factor * grown).to(dgate.dtype.element_ty), mask=at < size)
    tl.store(dup + at, (a * grown).to(dup.dtype.element_ty), mask=at < size)
    if AGAIN:
        tl.store(product + at, (a * factor).to(product.dtype.element_ty), mask=at < size)


@triton.jit
def gates_forward(f, g, rate, size, TILE: tl.constexpr):
    """g = rate · log σ(f); grid (tiles,)."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    logits = tl.load(f + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(g + at, rate * log_sigmoid(logits), mask=at < size)


@triton.jit
def gates_backward(f, dg, df, rate, size, TILE: tl.constexpr):
    """df = rate · σ(-f) dg; grid (tiles,)."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    logits = tl.load(f + at, mask=at < size, other=0.0).to(tl.float32)
    grown = tl.load(dg + at, mask=at < size, other=0.0)
    tl.store(df + at, (grown * (rate * sigmoid(-logits))).to(df.dtype.element_ty), mask=at < size)


@triton.jit
def _inside(row, rows, od, D: tl.constexpr, BD: tl.constexpr):
    inside = (row < rows)[:, None]
    if D % BD != 0:
        inside = inside & (od < D)[None, :]
    return inside


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, weight, y, inverse, rows, eps, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """y = r a(x) ∘ w and r = 1/√(mean(a²) + eps) [rows] of ROWS rows; grid (rows / ROWS,)."""
    row, od = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    inside = _inside(row, rows, od, D, BD)
    at = row.to(tl.int64)[:, None] * D + od[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a = value * sigmoid(value)
    r = tl.rsqrt(tl.sum(a * a, axis=1) / D + eps)
    out = a * r[:, None]
    if HAS_WEIGHT:
        out = out * tl.load(weight + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, r, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    x, weight, inverse, dy, y, dx, parts, rows,
    D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, AGAIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With u = dy ∘ w: dx = a'(x) r (u - a r² mean(a u)); and this program's part of dw = Σ_rows r a ∘ dy.

    A program takes every (number of programs)'th group of ROWS rows. parts: [programs, D]. With AGAIN also y as it was
    forward, which may take the place of dy.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    od = tl.arange(0, BD)
    total = tl.zeros([ROWS, BD], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + od, mask=od < D, other=0.0).to(tl.float32)
    for first in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = _inside(row, rows, od, D, BD)
        at = row.to(tl.int64)[:, None] * D + od[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grown = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        s = sigmoid(value)
        a = value * s
        if HAS_WEIGHT:
            total += grown * a * r
            grown = grown * w[None, :]
        mean = tl.sum(a * grown, axis=1)[:, None] / D
        slope = s * (1.0 + value * (1.0 - s))
        tl.store(dx + at, (slope * r * (grown - a * (r * r * mean))).to(dx.dtype.element_ty), mask=inside)
        if AGAIN:
            out = a * r
            if HAS_WEIGHT:
                out = out * w[None, :]
            tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(parts + program.to(tl.int64) * D + od, tl.sum(total, axis=0), mask=od < D)


@triton.jit(do_not_specialize=["rows"])
def add_norm_forward(
    x, branch, weight, total, y, inverse, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """h = x + branch, y = r h ∘ w and r = 1/√(mean(h²) + eps) [rows] of ROWS rows; grid (rows / ROWS,).

    The norm is that of h as it is stored, which the backward reads. Without a branch h is x and is not stored.
    """
    row, od = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    inside = _inside(row, rows, od, D, BD)
    at = row.to(tl.int64)[:, None] * D + od[None, :]
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        h += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        stored = h.to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=inside)
        h = stored.to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, axis=1) / D + eps)
    out = h * r[:, None]
    if HAS_WEIGHT:
        out = out * tl.load(weight + od, mask=od < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, r, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def add_norm_backward(
    total, weight, inverse, dtotal, dy, dbranch, dx, parts, rows,
    D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With n = r h and u = dy ∘ w: dx = dh + r (u - n mean(n u)); and this program's part of dw = Σ_rows n ∘ dy.

    Programs and `parts` as in `norm_backward`. HAS_SUM: there is dh, the gradient that h has from elsewhere.
    HAS_BRANCH: dx is wanted in the dtype of dbranch, too.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    od = tl.arange(0, BD)
    part = tl.zeros([ROWS, BD], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + od, mask=od < D, other=0.0).to(tl.float32)
    for first in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = _inside(row, rows, od, D, BD)
        at = row.to(tl.int64)[:, None] * D + od[None, :]
        h = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        grown = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        normed = h * r
        if HAS_WEIGHT:
            part += grown * normed
            grown = grown * w[None, :]
        mean = tl.sum(normed * grown, axis=1)[:, None] / D
        found = r * (grown - normed * mean)
        if HAS_SUM:
            found += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            tl.store(dbranch + at, found.to(dbranch.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(parts + program.to(tl.int64) * D + od, tl.sum(part, axis=0), mask=od < D)


class Rows:
    """How rows of D numbers are dealt to programs: ROWS at a time, padded to BD; warps of a program."""

    @staticmethod
    @functools.cache
    def of(D: int) -> "Rows":
        """That of D, made once: it is asked for at every launch."""
        return Rows(D)

    def __init__(self, D: int):
        BD = triton.next_power_of_2(D)
        self.rows = max(1, TILE // BD)
        self.sizes = {"D": D, "ROWS": self.rows, "BD": BD}
        self.warps = min(16, max(4, 4 * BD // TILE))


def _tiles(*tensors: Tensor) -> int:
    return sum(cdiv(x.numel(), TILE) for x in tensors)


def silu_each(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of each, in one launch."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _Silu.apply(q, k, v) if differentiated(q, k, v) else _silu(q, k, v)


def _silu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with torch.cuda.device_of(q):
        run(silu_forward, _tiles(q, k, v), (q, k, v, *out, q.numel(), k.numel(), v.numel()), {"TILE": TILE})
    return out


class _Silu(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return _silu(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        inputs = ctx.saved_tensors
        outgoing = [dy.contiguous() for dy in gradients]
        found = [torch.empty_like(x) for x in inputs]
        sizes = [x.numel() for x in inputs]
        with torch.cuda.device_of(inputs[0]):
            run(silu_backward, _tiles(*inputs), (*inputs, *outgoing, *found, *sizes), {"TILE": TILE})
        return tuple(found)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) ∘ up, of the same shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    return _Swiglu.apply(gate, up) if differentiated(gate, up) else swiglu_product(gate, up)


def swiglu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of contiguous tensors, without a gradient."""
    product = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        run(swiglu_forward, _tiles(gate), (gate, up, product, gate.numel()), {"TILE": TILE})
    return product


def swiglu_gradients(gate: Tensor, up: Tensor, dproduct: Tensor, again: bool, last_use: bool) -> tuple[Tensor, Tensor]:
    """dgate and dup of contiguous tensors.

    again: dproduct becomes the product, which costs one more pass. last_use: gate and up become their gradients.
    """
    dgate, dup = (gate, up) if last_use else (torch.empty_like(gate), torch.empty_like(up))
    with torch.cuda.device_of(gate):
        arguments = (gate, up, dproduct, dgate, dup, dproduct if again else None, gate.numel())
        run(swiglu_backward, _tiles(gate), arguments, {"TILE": TILE, "AGAIN": again})
    return dgate, dup


class _Swiglu(Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dproduct):
        gate, up = ctx.saved_tensors
        return swiglu_gradients(gate, up, dproduct.contiguous(), again=False, last_use=False)


def log_gates(f: Tensor, normalizer: float) -> Tensor:
    """log σ(f) / normalizer in float32."""
    f = f.contiguous()
    return _Gates.apply(f, 1 / normalizer) if differentiated(f) else _gates(f, 1 / normalizer)


def _gates(f: Tensor, rate: float) -> Tensor:
    g = torch.empty_like(f, dtype=torch.float32)
    with torch.cuda.device_of(f):
        run(gates_forward, _tiles(f), (f, g, rate, f.numel()), {"TILE": TILE})
    return g


class _Gates(Function):
    @staticmethod
    def forward(ctx, f, rate):
        ctx.save_for_backward(f)
        ctx.rate = rate
        return _gates(f, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dg):
        (f,) = ctx.saved_tensors
        df = torch.empty_like(f)
        with torch.cuda.device_of(f):
            run(gates_backward, _tiles(f), (f, dg.contiguous(), df, ctx.rate, f.numel()), {"TILE": TILE})
        return df, None


def silu_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of SiLU over the last dimension."""
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    return _SiluNorm.apply(x, weight, eps) if differentiated(x, weight) else silu_normed(x, weight, eps)[0]


def silu_normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`silu_norm` of contiguous tensors, without a gradient; and r of every row, which its backward takes."""
    plan, rows = Rows.of(x.shape[-1]), x.numel() // x.shape[-1]
    y, inverse = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        constants = plan.sizes | {"HAS_WEIGHT": weight is not None}
        programs = cdiv(rows, plan.rows)
        run(norm_forward, programs, (x, weight, y, inverse, rows, eps), constants, plan.warps)
    return y, inverse


class _SiluNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse = silu_normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        return *silu_norm_gradients(x, weight, inverse, dy.contiguous(), again=False), None


def silu_norm_gradients(x: Tensor, weight: Tensor | None, inverse: Tensor, dy: Tensor, again: bool):
    """dx and dw of contiguous tensors; with `again` dy becomes y, which costs one more pass."""
    return _norm_gradients(norm_backward, x, weight, inverse, dy, dy if again else None, AGAIN=again)


def _norm_gradients(kernel, x: Tensor, weight: Tensor | None, inverse: Tensor, *outgoing: Tensor | None, **constants):
    """dx and dw of a norm of x by its backward kernel."""
    plan, dx, parts = Rows.of(x.shape[-1]), torch.empty_like(x), None
    programs = cdiv(inverse.numel(), plan.rows)
    if weight is not None:
        programs = min(programs, SHARES)
        parts = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        arguments = (x, weight, inverse, *outgoing, dx, parts, inverse.numel())
        constants |= plan.sizes | {"HAS_WEIGHT": weight is not None, "STAGES": 1 if weight is None else STAGES}
        run(kernel, programs, arguments, constants, plan.warps)
    return dx, None if weight is None or parts is None else parts.sum(0).to(weight.dtype)


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and its RMSNorm over the last dimension; without a branch x itself, and its RMSNorm."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    weight = None if weight is None else weight.contiguous()
    if differentiated(x, branch, weight):
        return _AddNorm.apply(x, branch, weight, eps)
    return _add_norm(x, branch, weight, eps)[:2]


def _add_norm(x: Tensor, branch: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, y, and r of every row."""
    plan, rows, total = Rows.of(x.shape[-1]), x.numel() // x.shape[-1], x
    if branch is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    y = torch.empty_like(total, dtype=product_dtype(total))
    inverse = x.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        constants = plan.sizes | {"HAS_BRANCH": branch is not None, "HAS_WEIGHT": weight is not None}
        arguments = (x, branch, weight, None if branch is None else total, y, inverse, rows, eps)
        run(add_norm_forward, cdiv(rows, plan.rows), arguments, constants, plan.warps)
    return total, y, inverse


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps):
        total, y, inverse = _add_norm(x, branch, weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        total, weight, inverse = ctx.saved_tensors
        dx, dbranch, dweight = dtotal, None, None
        if dy is not None:
            dtotal = None if dtotal is None else dtotal.contiguous()
            if ctx.dtypes[1] not in (None, total.dtype):
                dbranch = torch.empty_like(total, dtype=ctx.dtypes[1])
            outgoing = (dtotal, dy.contiguous(), dbranch)
            constants = {"HAS_SUM": dtotal is not None, "HAS_BRANCH": dbranch is not None}
            dx, dweight = _norm_gradients(add_norm_backward, total, weight, inverse, *outgoing, **constants)
        of_x, of_branch = (None if dx is None or dtype is None else dx.to(dtype) for dtype in ctx.dtypes)
        return of_x, of_branch if dbranch is None else dbranch, dweight, None
