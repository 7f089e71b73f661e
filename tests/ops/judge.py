"""A judge for any size, format and device: truth in float64, the same maths in low precision, and the verdict.

Both are the operator unrolled over pairs of tokens, without chunks and without a recurrence,

    W_tj = s_j e^{E_tj}, E_tj = Σ_{j<i≤t} g_i, e_t = e^{Σ_{i≤t} g_i}      (per slot; W_tj = 0 for j > t)
    ℓ_t  = scale (Σ_j (q_t·k_j) W_tj + e_t ∘ K̃₀ q_t)                      p_t = softmax(ℓ_t)
    o_t  = Σ_j (p_t·W_tj) v_j + Ṽ₀ᵀ (p_t ∘ e_t)
    K̃_T  = Σ_j W_Tj ⊗ k_j + e_T ∘ K̃₀                                       (Ṽ_T likewise with v)

every exponent being summed from the gates between its two ends: no gate is too strong. Time and memory go with T².

`truth` does all of it in float64. `plain` is what any implementation with matrix units must lose: every product of
two tensors, in the forward and in the backward, takes its factors rounded to the inputs' dtype and is summed in
float32; all else is float32; results and gradients are rounded once, at the end, to the dtype of what they belong to.
"""

import torch
from torch import Tensor

from . import test_linear as linear
from .helpers import EPS, TINY, Case, Tensors, with_gradients

CUDA = torch.device("cuda")

seen: list[tuple[str, str, float, float]] = []
"""What the running test compared: the inputs' format, the result's name, its error in units of plain PyTorch's, and as
a share of what is allowed (`conftest.errors_are_recorded`)."""


class _Product(torch.autograd.Function):
    """einsum(spec, x, y) with both factors rounded to `dtype`; its two gradients are such products too."""

    @staticmethod
    def forward(ctx, spec: str, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        x, y = x.to(dtype).to(x.dtype), y.to(dtype).to(y.dtype)
        ctx.save_for_backward(x, y)
        ctx.spec, ctx.dtype = spec, dtype
        return torch.einsum(spec, x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad = grad.to(ctx.dtype).to(grad.dtype)
        of_x, of_y, of_result = ctx.spec.replace("->", ",").split(",")
        dx = torch.einsum(f"{of_result},{of_y}->{of_x}", grad, y) if ctx.needs_input_grad[1] else None
        dy = torch.einsum(f"{of_result},{of_x}->{of_y}", grad, x) if ctx.needs_input_grad[2] else None
        return None, dx, dy, None


def unrolled(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(o, hk, hv) by the sums above, with products of factors in `dtype`; o comes in `dtype`."""
    x, place = _wide(x, case, dtype)
    q, k, v, g = (x[name] for name in "qkvg")
    s = x["s"] if "s" in x else -torch.expm1(g)
    decay, grown = _decays(g)
    weight = decay * s.transpose(1, 2)[:, :, None]  # [n, H, t, j, M]

    def product(spec: str, left: Tensor, right: Tensor) -> Tensor:
        return _Product.apply(spec, left, right, dtype)

    scores = case.scale * product("nthrk,njhk->nhrtj", q, k)
    logits = product("nhrtj,nhtjm->nhrtm", scores, weight)
    if "hk" in x:
        logits = logits + case.scale * grown[:, :, None] * product("nthrk,nhkm->nhrtm", q, x["hk"])
    p = logits.softmax(-1)
    o = product("nhrtj,njhv->nthrv", product("nhrtm,nhtjm->nhrtj", p, weight), v)
    if "hv" in x:
        o = o + product("nhrtm,nhmv->nthrv", p * grown[:, :, None], x["hv"])

    hk = product("nhjm,njhk->nhkm", weight[:, :, -1], k)
    hv = product("nhjm,njhv->nhmv", weight[:, :, -1], v)
    if "hk" in x:
        last = grown[:, :, -1]
        hk, hv = hk + x["hk"] * last[:, :, None], hv + x["hv"] * last[..., None]
    return _as_given(o, place, case).to(dtype), hk, hv


def by_states(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the two states of every token, as the recurrence has them: float32, rounded where q and p read them
    (ℓ_t = scale K̃_t q_t, o_t = Ṽ_tᵀ p_t)."""
    x, place = _wide(x, case, dtype)
    q, k, v, g = (x[name] for name in "qkvg")
    s = x["s"] if "s" in x else -torch.expm1(g)
    decay, grown = _decays(g)
    weight = decay * s.transpose(1, 2)[:, :, None]  # [n, H, t, j, M]
    hk = torch.einsum("nhtjm,njhk->nhtkm", weight, k)
    hv = torch.einsum("nhtjm,njhv->nhtmv", weight, v)
    if "hk" in x:
        hk, hv = hk + grown[:, :, :, None] * x["hk"][:, :, None], hv + grown[..., None] * x["hv"][:, :, None]
    logits = case.scale * _Product.apply("nthrk,nhtkm->nhrtm", q, hk, dtype)
    o = _Product.apply("nhrtm,nhtmv->nthrv", logits.softmax(-1), hv, dtype)
    return _as_given(o, place, case).to(dtype), hk[:, :, -1], hv[:, :, -1]


def unrolled_linear(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(o, state) of gated linear attention likewise: o_t = scale (Σ_j (q_t · k_j ∘ e^{E_tj}) v_j + S₀ᵀ (q_t ∘ e_t)),
    S_T = Σ_j (k_j ∘ e^{E_Tj}) ⊗ v_j + e_T ∘ S₀."""
    x, place = _wide(x, case, dtype)
    q, k, v, g = (x[name] for name in "qkvg")
    decay, grown = _decays(g)
    weight = decay * k.transpose(1, 2)[:, :, None]  # [n, H, t, j, K]
    q = q.permute(0, 2, 3, 1, 4)  # [n, H, R, T, K]

    def product(spec: str, left: Tensor, right: Tensor) -> Tensor:
        return _Product.apply(spec, left, right, dtype)

    o = product("nhrtj,njhv->nthrv", product("nhrtk,nhtjk->nhrtj", q, weight), v)
    state = product("nhjk,njhv->nhkv", weight[:, :, -1], v)
    if "state" in x:
        o = o + product("nhrtk,nhkv->nthrv", q * grown[:, :, None], x["state"])
        state = state + x["state"] * grown[:, :, -1, :, None]
    return _as_given(case.scale * o, place, case).to(dtype), state


def _wide(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensors, Tensor | None]:
    """x in the format of sums, packed sequences as a batch (`_places` says how), query heads [n, T, H, R, K]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    place = None if case.lengths is None else _places(case.lengths, x["q"].device)
    x = {name: tensor.to(wide) for name, tensor in x.items()}
    if place is not None:
        x = {name: _padded(tensor, place) if name in "qkvgs" else tensor for name, tensor in x.items()}
    return x | {"q": x["q"].unflatten(2, (case.H, case.HQ // case.H))}, place


def _as_given(o: Tensor, place: Tensor | None, case: Case) -> Tensor:
    """o [n, T, H, R, V] as q came."""
    o = o.flatten(2, 3)
    return o if place is None else o[place < case.T][None]


def _decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """Of g [n, T, H, M]: e^{E_tj} [n, H, t, j, M], 0 for j > t, and e_t [n, H, T, M]."""
    g = g.transpose(1, 2)
    t = torch.arange(g.shape[2], device=g.device)
    after, seen = (t[:, None] > t)[..., None], (t[:, None] >= t)[..., None]
    exponent = torch.where(after, g[:, :, :, None], 0.0).cumsum(2)
    return torch.where(seen, exponent.exp(), 0.0), g.cumsum(2).exp()


def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[S, longest]: where the tokens of each packed sequence stand; the number of tokens where it has none left."""
    size = torch.tensor(lengths, device=device)[:, None]
    position = torch.arange(max(1, *lengths), device=device)
    return torch.where(position < size, size.cumsum(0) - size + position, sum(lengths))


def _padded(x: Tensor, place: Tensor) -> Tensor:
    """Packed [1, N, …] as a batch [S, longest, …]. Padding is zeros: a token with g = 0 and s = 0 changes no state."""
    return torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])[place]


def truth(x: Tensors, case: Case, final: bool = True) -> Tensors:
    """Results and gradients in float64, of the inputs as they are; without `final`, of o alone."""
    return _results(x, case, torch.float64, dict.fromkeys(x, torch.float64), final)


def plain(x: Tensors, case: Case, final: bool = True, maths=unrolled) -> Tensors:
    """Results and gradients where every product is of factors in the dtype of q, k, v; without `final`, of o alone."""
    return _results(x, case, x["q"].dtype, None, final, maths)


def _results(x, case, dtype, leaves, final, maths=unrolled):
    def results(z):
        o, *states = maths(z, case, dtype)
        return (o, *states) if final else o_alone(o)

    return with_gradients(results, x, leaves)


def linear_results(x: Tensors, case: Case, dtype: torch.dtype) -> Tensors:
    """Results and gradients of gated linear attention: `truth` in float64, `plain` in the dtype of q, k, v."""
    leaves = {name: tensor.double() for name, tensor in x.items()} if dtype == torch.float64 else x
    found = linear.with_gradients(lambda z: unrolled_linear(z, case, dtype), leaves)
    return {name: y.to(x["q"].device) for name, y in found.items()}


def o_alone(o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o and two empty states: what to hand to `with_gradients` where no final state is asked for."""
    return o, o.new_zeros(0), o.new_zeros(0)


def verdict(
    result: Tensors,
    x: Tensors,
    case: Case,
    *,
    units: int = 8,
    final: bool = True,
    alike: bool = False,
    add_up: bool = False,
) -> None:
    """Every result and gradient is finite and at most twice as far from `truth` as `plain` is, in the Euclidean norm.

    `plain` may hit a few numbers by luck. So nothing has to be nearer than

    - what comes in the inputs' dtype, and gradients: half a unit of that dtype in the last place of its own norm, and
      for n rows 2/√n times as much again, rows being what one rounded weight multiplies (`_rows`): two norms of a few
      roundings are rarely alike;
    - dq, dhk and dg also that of what the backward of the softmax subtracts, which is of the size of v ∘ dv;
    - dg also that of the sums over tokens that it is the difference of, Σ_{t≥i} dℓ_t ∘ ℓ_t + p_t ∘ dp_t and
      Σ_{t≥i} s_t ∘ ds_t: `plain` adds up what is left of them pair by pair, which nothing that takes chunks can do;
    - everything: `units` of float32 in the last place of these norms.

    The final states have no floor in the inputs' dtype: they are float32, and are not to be rounded on their way. Of n
    rows they may be 1/√n times as much farther than that: in one row few weights count, those of the last tokens, and
    `plain`, which rounds other numbers, may be lucky with them. Where gates are strong and all `alike`, one number,
    1 - e^g, decides however many rows there are: `plain` rounds that, we a multiple of it; they have the floor there.

    Where states `add_up`, forgetting nothing, the worse of `plain` and the same `by_states` counts. A score of T tokens
    is a sum of T roundings there, which cancel, and here of K of a sum, which do not: with 200 tokens added to keys of
    80, 2.4 times `plain`, in any implementation that keeps sums.
    """
    exact, written = truth_and_sums(x, case, final)
    moved = (exact["dv"] * x["v"].double()).norm()
    differences = {"dq": moved, "dhk": moved, "dg": moved + written}
    usual = [plain(x, case, final)]
    if add_up:
        usual.append(plain(x, case, final, by_states))
    compare(result, exact, usual, x["q"].dtype, moved, differences, units, alike)


def linear_verdict(result: Tensors, x: Tensors, case: Case, *, units: int = 8, alike: bool = False) -> None:
    """The same of gated linear attention. dg alone is a difference of sums there, Σ_{t≥i} q_t ∘ dq_t and the same of
    k ∘ dk."""
    exact, usual = (linear_results(x, case, dtype) for dtype in (torch.float64, x["q"].dtype))
    moved = _from_each_token(exact["dk"] * x["k"].double(), case).norm()
    compare(result, exact, [usual], x["q"].dtype, moved, {"dg": moved}, units, alike)


def truth_and_sums(x: Tensors, case: Case, final: bool) -> tuple[Tensors, Tensor]:
    """`truth`, and the norm of Σ_{t≥i} s_t ∘ ds_t of all tokens i."""
    s = x["s"].double() if "s" in x else -torch.expm1(x["g"].double())
    exact = truth(x | {"s": s}, case, final)
    written = _from_each_token(exact["ds"] * s, case).norm()
    if "s" not in x:  # s = 1 - e^g
        exact["dg"] = exact["dg"] - x["g"].double().exp() * exact.pop("ds")
    return exact, written


def _from_each_token(y: Tensor, case: Case) -> Tensor:
    """Σ_{t≥i} y_t within each sequence, of y [B, T, …]."""
    parts = y.split(list(case.lengths or [case.T]), 1)
    return torch.cat([part.flip(1).cumsum(1) for part in parts], 1)


def compare(result, exact, usual, dtype, moved, differences, units, alike=False) -> None:
    """`verdict`, given truth and what plain PyTorch makes, in one or more ways; `moved` is the size of what gradients
    are sums of, `differences` maps the names of those that lose more of it to the size of what they are the differences
    of."""
    assert result.keys() == exact.keys()
    half = torch.finfo(dtype).eps / 2
    wrong = []
    for name, y in result.items():
        want = exact[name]
        assert y.shape == want.shape, name
        for one in usual:
            assert one[name].isfinite().all(), f"{name} of plain PyTorch is not finite: nothing to compare with"
            assert y.dtype == one[name].dtype, f"{name} is {y.dtype}"
        if not y.isfinite().all():
            wrong.append(f"{name} is not finite")
            continue
        size = want.norm()
        sums = differences.get(name, moved) if name.startswith("d") else 0.0
        floor = units * EPS * (size + sums) + TINY * want.numel() ** 0.5
        usually = max((one[name].double() - want).norm() for one in usual)
        lost, rows = usually, max(1, _rows(name, want))
        if name in ("hk", "hv", "final"):
            lost = lost * (1 + 1 / rows**0.5)
            floor = max(floor, half * size if alike else 0.0)
        else:
            floor = max(floor, (1 + 2 / rows**0.5) * half * (size + differences.get(name, 0.0)))
        error, allowed = (y.double() - want).norm(), max(2 * lost, floor)
        if usually:
            seen.append((str(dtype).removeprefix("torch."), name, float(error / usually), float(error / allowed)))
        if error > allowed:
            wrong.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}, norm {size:.2e}")
    assert not wrong, "; ".join(wrong)


def _rows(name: str, y: Tensor) -> int:
    """Of how many rows a result consists, each of numbers that one weight multiplies: of K or V numbers in o, states
    and gradients of vectors and states, else of one."""
    of_states = ("hv", "dhv", "final", "dstate")
    widths = dict.fromkeys(("hk", "dhk"), 2) | dict.fromkeys(("o", "dq", "dk", "dv", *of_states), -1)
    return y.numel() // y.shape[widths[name]] if name in widths and y.numel() else y.numel()


def distance(x: Tensor, y: Tensor) -> float:
    """‖x - y‖ / ‖y‖; 0 for two tensors of zeros."""
    x, y = x.double(), y.double()
    return float((x - y).norm() / y.norm().clamp(min=TINY))
