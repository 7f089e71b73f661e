"""Gated linear attention: every backend against the recurrence, and what must hold whatever the numbers are."""

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_gsa import gated_linear_attention, gated_linear_attention_step, gated_slot_attention
from flash_gsa.errors import UsageError
from flash_gsa.ops import Backend, Problem, explain, register_backend, registry
from flash_gsa.ops.reference_linear import reference_linear_forward, reference_linear_step

from .helpers import EPS, TINY, Case, Tensors
from .helpers import make as make_slots

CLOSE = {"rtol": 0, "atol": 64 * EPS}  # against results of size 1, summed in another order
CASES = [
    Case(),
    Case(T=1),
    Case(T=16, K=5, V=3, state=False),
    Case(T=33, K=1, V=1),
    Case(T=63, HQ=4, H=1, scale=0.35),
    Case(T=64, B=1, HQ=4, H=2),
    Case(T=130, K=16, V=7, scale=2.0),
    Case(lengths=(17, 64, 1, 0, 130, 5)),
    Case(lengths=(0, 40, 66), HQ=4, H=2, state=False),
    Case(lengths=(0, 0)),
    Case(T=0),
]


def make(case: Case, seed: int = 0, one_gate: bool = False) -> Tensors:
    """float32 inputs as a trained layer has them; gates logsigmoid(N(0, 1)) / 8, for each key dimension or a head."""
    x = make_slots(replace(case, M=1 if one_gate else case.K), seed)
    random = torch.Generator().manual_seed(seed + 1000)
    if case.state:
        x["state"] = torch.randn(case.sequences, case.H, case.K, case.V, generator=random)
    return {name: tensor for name, tensor in x.items() if name not in ("hk", "hv")}


def to(x: Tensors, device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in x.items()}


def call(backend: str, x: Tensors, case: Case) -> tuple[Tensor, Tensor]:
    """(o, state) of `backend`; skips the test where the backend says that it cannot."""
    q, k, v, g = (x[name] for name in "qkvg")
    problem = Problem(
        *q.shape[:3], *k.shape[2:], v.shape[3], k.shape[3], q.dtype, q.device.type, case.lengths is not None, True
    )
    if reason := dict(explain(problem))[backend]:
        pytest.skip(f"{backend}: {reason}")
    o, state = gated_linear_attention(
        q, k, v, g,
        scale=case.scale, initial_state=x.get("state"), output_final_state=True, cu_seqlens=case.cu_seqlens,
        backend=backend,
    )  # fmt: skip
    assert state is not None
    return o, state


def recurrence(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(o, state) token by token from the equations, in `dtype`."""
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    rows = [slice(None)] if case.lengths is None else [slice(n, n + 1) for n in range(case.sequences)]
    bounds = [0, case.T] if case.lengths is None else [0, *accumulate(case.lengths)]
    outputs, finals = [], []
    for row, (start, end) in zip(rows, pairwise(bounds), strict=True):
        N = case.B if case.lengths is None else 1
        state = x["state"][row] if "state" in x else torch.zeros(N, case.H, case.K, case.V, dtype=dtype)
        for q, k, v, g in zip(*(x[name][:, start:end].unbind(1) for name in "qkvg"), strict=True):
            state = state * g.exp()[..., None] + torch.einsum("bhk,bhv->bhkv", k, v)
            read = state.repeat_interleave(case.HQ // case.H, 1)
            outputs.append(case.scale * torch.einsum("bhk,bhkv->bhv", q, read))
        finals.append(state)
    o = torch.stack(outputs, 1) if outputs else x["q"].new_zeros(case.B, 0, case.HQ, case.V)
    return o, torch.cat(finals)


def with_gradients(function, x: Tensors) -> Tensors:
    """`function(leaves) -> (o, state)`: these and the gradients of every input, from both at once."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    results = dict(zip(("o", "final"), function(leaves), strict=True))
    random = torch.Generator().manual_seed(99)
    loss = sum(
        (y.double() * torch.randn(y.shape, generator=random).bfloat16().to(y.device, torch.float64)).sum()
        for y in results.values()
    )
    if loss.requires_grad:  # not so for a batch without tokens and states
        loss.backward()
    found = {name: y.detach().cpu() for name, y in results.items()}
    for name, leaf in leaves.items():
        found[f"d{name}"] = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).cpu()
    return found


def run(backend: str, x: Tensors, case: Case, device="cpu") -> Tensors:
    return with_gradients(lambda z: call(backend, z, case), to(x, device))


def check(result: Tensors, x: Tensors, case: Case, units: int = 8) -> None:
    """Finite, and at most twice as far from the recurrence in float64 as the same in float32 (helpers.check)."""

    def oracle(dtype):
        return with_gradients(lambda z: recurrence(z, case, dtype), {n: y.to(dtype) for n, y in x.items()})

    exact, plain = oracle(torch.float64), oracle(torch.float32)
    # Gradients of gates are differences of sums of the size of v ∘ dv and k ∘ dk.
    moved = sum((exact[f"d{name}"] * x[name].double()).norm() for name in "kv")
    for name, y in result.items():
        want = exact[name]
        assert y.shape == want.shape, name
        assert y.isfinite().all(), f"{name} is not finite"
        rounded = plain[name].to(y.dtype).double()
        unit = EPS * (want.norm() + (moved if name.startswith("d") else 0.0)) + TINY * want.numel() ** 0.5
        error, allowed = (y.double() - want).norm(), 2 * (rounded - want).norm() + units * unit
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, norm {want.norm():.2e}"


@pytest.mark.parametrize("one_gate", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, device, case, one_gate):
    x = make(case, one_gate=one_gate)
    check(run(backend, x, case, device), x, case)


def test_is_the_definition(backend, device):
    case = Case(T=20, HQ=4, H=2, K=3, V=5, scale=0.7)
    x = {name: tensor.double() for name, tensor in make(case).items()}
    o, final = (y.cpu().numpy() for y in call(backend, to(x, device), case))
    z = {name: tensor.numpy() for name, tensor in x.items()}
    for b, t, i in np.ndindex(case.B, case.T, case.HQ):
        h = i // 2
        state = np.exp(z["g"][b, : t + 1, h].sum(0))[:, None] * z["state"][b, h]
        for j in range(t + 1):
            alive = np.exp(z["g"][b, j + 1 : t + 1, h].sum(0))
            state = state + np.outer(alive * z["k"][b, j, h], z["v"][b, j, h])
        np.testing.assert_allclose(o[b, t, i], 0.7 * state.T @ z["q"][b, t, i], rtol=1e-11, atol=1e-12)
        if t == case.T - 1:
            np.testing.assert_allclose(final[b, h], state, rtol=1e-11, atol=1e-12)


def test_is_the_second_pass_of_gated_slot_attention(backend, device):
    """With queries that are the softmax over the slots and keys that are the write strengths."""
    case = Case(T=70, HQ=4, H=2, M=6)
    x = to({name: tensor.double() for name, tensor in make_slots(case).items()}, device)
    q, k, v, g = (x[name] for name in "qkvg")
    want, (_, hv) = gated_slot_attention(q, k, v, g, initial_state=(x["hk"], x["hv"]), output_final_state=True)
    s = -torch.expm1(g)
    # The first pass is one too: its values are the write strengths, its decay lies on the value axis.
    scores, hk = [], x["hk"]
    for qt, kt, gt, st_ in zip(*(y.unbind(1) for y in (q, k, g, s)), strict=True):
        hk = hk * gt.exp()[:, :, None] + kt[..., None] * st_[:, :, None]
        scores.append(torch.einsum("bhk,bhkm->bhm", qt, hk.repeat_interleave(2, 1)))
    second = {"q": torch.stack(scores, 1).softmax(-1), "k": s, "v": v, "g": g, "state": x["hv"]}
    o, state = call(backend, second, case)
    torch.testing.assert_close(o, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, hv, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_rounded_only_at_the_ends(backend, device, dtype):
    case = Case(T=130, HQ=4, H=2)
    x = {name: tensor.to(dtype) if name in "qkv" else tensor for name, tensor in make(case).items()}
    from .judge import linear_verdict  # which takes the recurrence from here

    result = run(backend, x, case, device)
    assert result["o"].dtype == dtype
    assert result["final"].dtype == torch.float32
    if backend == "triton":  # its products are of 16-bit factors
        linear_verdict(result, x, case)
    else:
        check(result, x, case)


@pytest.mark.parametrize("lengths", [None, (3, 0, 4)])
@pytest.mark.parametrize("strong", [False, True])
def test_gradients_agree_with_finite_differences(backend, device, strong, lengths):
    case = Case(T=7, B=1, HQ=2, H=1, K=2, V=3, scale=0.8, lengths=lengths)
    x = to({name: tensor.double() for name, tensor in make(case).items()}, device)
    if strong:
        x["g"][:, 1], x["g"][:, 4, :, 0] = -40.0, -30.0
    for tensor in x.values():
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *values: call(backend, dict(zip(x, values, strict=True)), case), tuple(x.values())
    )


def any_problem(
    data: st.DataObject, T: int, K: st.SearchStrategy[int], V: st.SearchStrategy[int], most: int = 3
) -> tuple[Case, Tensors]:
    """A case and inputs for it, in which some tokens forget less or more than the others; `most`: rows, heads, query
    heads a group, packed sequences, these of up to T tokens."""
    few = st.integers(1, most)
    H = data.draw(few)
    case = Case(
        T=data.draw(st.integers(1, T)),
        B=data.draw(few),
        HQ=H * data.draw(few),
        H=H,
        K=data.draw(K),
        V=data.draw(V),
        state=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 0.25, -1.0])),
        lengths=data.draw(st.none() | st.lists(st.integers(0, T), min_size=1, max_size=most).map(tuple)),
    )
    x = make(case, seed=data.draw(st.integers(0, 9)), one_gate=data.draw(st.booleans()))
    if case.T:
        place = data.draw(st.integers(0, case.T - 1))
        x["g"][:, place : place + data.draw(st.integers(1, 40))] *= data.draw(st.sampled_from([0.0, 1.0, 8.0, 800.0]))
    return case, x


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_packing_and_gates(data):
    case, x = any_problem(data, 90, st.integers(1, 9), st.integers(1, 9))
    # A sum of gates near -60, rounded to float32, moves its exponential by 60 half units; a product takes two of them.
    check(run("chunk", x, case), x, case, units=8 + 60)


STRONG = {
    "all 0": lambda g: g.fill_(0.0),
    "all -5": lambda g: g.fill_(-5.0),
    "all -1e30": lambda g: g.fill_(-1e30),
    "all -inf": lambda g: g.fill_(float("-inf")),
    "one -55": lambda g: g[:, 20].fill_(-55.0),
    "one -1e4": lambda g: g[:, 20].fill_(-1e4),
    "one -3e38 of one row": lambda g: g[:, 31, :, 1].fill_(-3e38),
    "alternating -50": lambda g: g[:, ::2].fill_(-50.0),
}


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("case", [Case(T=100), Case(lengths=(70, 0, 1, 66), HQ=4, H=2, state=False)], ids=str)
def test_strong_gates(backend, device, name, case):
    x = make(case)
    STRONG[name](x["g"])
    check(run(backend, x, case, device), x, case, units=8 if backend == "triton" else 8 + 60)


@pytest.mark.parametrize("strong_prefix", [False, True])
def test_a_prefix_does_not_depend_on_what_follows_by_a_bit(backend, device, strong_prefix):
    case = Case(T=140, B=1, HQ=4, H=2)
    x, other = make(case), make(case, seed=1)
    if strong_prefix:
        x["g"][:, 20:22, :, 0], x["g"][:, 90] = -70.0, -1e5
    before = call(backend, to(x, device), case)[0]
    for t in (1, 15, 16, 31, 32, 33, 63, 64, 65, 100, 128, 139):
        for gates in (None, -55.0, -1e30):
            y = {name: tensor.clone() for name, tensor in x.items()}
            for name in "qkvg":
                y[name][:, t:] = 3 * other[name][:, t:]
            if gates is not None:
                y["g"][:, t:] = gates
            after = call(backend, to(y, device), case)[0]
            assert torch.equal(before[:, :t], after[:, :t]), (t, gates)
            assert not torch.equal(before[:, t:], after[:, t:])


def test_packed_is_a_loop_over_sequences(backend, device):
    case = Case(lengths=(0, 17, 64, 1, 0, 130, 5, 0), HQ=4, H=2, scale=0.6)
    x = to(make(case), device)
    o, final = call(backend, x, case)
    start = 0
    for n, length in enumerate(case.lengths):
        y = {name: tensor[:, start : start + length] for name, tensor in x.items() if name != "state"}
        y["state"] = x["state"][n : n + 1]
        single = call(backend, y, Case(T=length, B=1, HQ=4, H=2, scale=0.6))
        torch.testing.assert_close(single[0], o[:, start : start + length], **CLOSE)
        torch.testing.assert_close(single[1], final[n : n + 1], **CLOSE)
        start += length


@pytest.mark.parametrize("bounds", [(0, 100), (0, 1, 2, 100), (0, 64, 100), (0, 37, 37, 99, 100)])
def test_pieces_carried_through_the_state_are_one_pass(backend, device, bounds):
    case = Case(T=100, HQ=4, H=2)
    x = make(case)
    x["g"][:, 70, :, 3] = -200.0

    def in_pieces(z):
        outputs, state = [], z["state"]
        for start, end in pairwise(bounds):
            piece = {name: y[:, start:end] for name, y in z.items() if name != "state"} | {"state": state}
            o, state = call(backend, piece, Case(T=end - start, HQ=4, H=2))
            outputs.append(o)
        return torch.cat(outputs, 1), state

    whole, pieces = run(backend, x, case, device), with_gradients(in_pieces, to(x, device))
    for name, want in whole.items():
        torch.testing.assert_close(pieces[name], want, rtol=64 * EPS, atol=64 * EPS * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("one_gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_are_the_sequence(backend, device, dtype, one_gate):
    case = Case(T=50, HQ=4, H=2, scale=0.6)
    x = to(make(case, one_gate=one_gate), device)
    x = {n: y.double() if dtype == torch.float64 else y.to(dtype) if n in "qkv" else y for n, y in x.items()}
    o, final = call(backend, x, case)
    outputs, state = [], x["state"]
    kept = state.clone()
    for t in range(case.T):
        token = [x[name][:, t] for name in "qkvg"]
        step, state = gated_linear_attention_step(*token, state=state, scale=0.6, backend=backend)
        outputs.append(step)
    assert outputs[0].dtype == dtype
    assert torch.equal(x["state"], kept)
    steps = torch.stack(outputs, 1)
    if backend == "triton" and dtype == torch.bfloat16:  # a sequence by products of 16-bit factors, a step in float32
        for one, other in ((steps, o), (state, final)):
            assert float((one - other).double().norm() / other.double().norm()) <= 2 * torch.finfo(dtype).eps
    else:
        torch.testing.assert_close(steps, o, rtol=2 * torch.finfo(dtype).eps, atol=64 * EPS)
        torch.testing.assert_close(state, final, **CLOSE)


def test_two_runs_give_the_same_bits_and_autocast_does_not_reach_inside(backend, device):
    case = Case(T=130)
    x = make(case)
    x["g"][:, 40] = -1e6
    first, second = run(backend, x, case, device), run(backend, x, case, device)
    assert all(torch.equal(y, second[name]) for name, y in first.items())
    on_device = to(x, device)
    token = [on_device[name][:, 0] for name in "qkvg"]
    step = gated_linear_attention_step(*token, state=on_device["state"], backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        inside = call(backend, on_device, case)
        step_inside = gated_linear_attention_step(*token, state=on_device["state"], backend=backend)
    assert torch.equal(inside[0].cpu(), first["o"])
    assert torch.equal(step_inside[1], step[1])


def test_a_state_is_returned_only_where_asked_for():
    x = make(Case(state=False))
    o, state = gated_linear_attention(*(x[name] for name in "qkvg"))
    assert state is None
    assert torch.equal(o, call("chunk", x, Case(state=False))[0])


# Choosing a backend.


@pytest.fixture
def added(monkeypatch):
    """Register a backend for one test: `added(**fields)`."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))

    def add(**fields):
        register_backend(
            Backend(
                name="extra",
                forward=None,
                unsupported=fields.pop("unsupported", lambda p: None),
                priority=100,
                **fields,
            )
        )

    return add


def test_a_backend_without_it_is_passed_over_and_says_so(added):
    added()
    x = make(Case(state=False))
    arguments = [x[name] for name in "qkvg"]
    gated_linear_attention(*arguments)
    state = torch.zeros(2, 2, 8, 12)
    gated_linear_attention_step(*(y[:, 0] for y in arguments), state=state)
    with pytest.raises(
        UsageError, match=r"'extra' cannot run this: it has no gated linear attention. These can: .*chunk"
    ):
        gated_linear_attention(*arguments, backend="extra")


@pytest.mark.parametrize("own", [False, True])
def test_a_backend_is_asked_with_the_problem_and_given_gates_of_the_keys_shape(added, own):
    asked, calls = [], []

    def forward(*arguments):
        calls.append(arguments)
        return reference_linear_forward(*arguments)

    def step(*arguments):
        calls.append(arguments)
        return reference_linear_step(*arguments)

    added(linear_forward=forward, linear_step=step if own else None, unsupported=lambda p: asked.append(p))
    case = Case(T=6, HQ=4, H=2, K=3, V=5, scale=0.5)
    x = make(case, one_gate=True)
    call("extra", x, case)
    gated_linear_attention_step(*(x[name][:, 0] for name in "qkvg"), state=x["state"], backend="extra")
    assert set(asked) == {Problem(2, T, 4, 2, 3, 5, 3, torch.float32, "cpu", linear=True) for T in (6, 1)}
    assert len(calls) == 1 + own
    assert calls[0][3].shape == (2, 6, 2, 3)
    assert calls[0][4:] == (0.5, x["state"], True, None)


# Refusals.

B, T, HQ, H, K, V = 2, 6, 4, 2, 3, 5


def arguments(**changes) -> dict:
    x = {
        "q": torch.randn(B, T, HQ, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "g": -torch.rand(B, T, H, K),
    }
    return x | changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"g": -torch.rand(B, T, H)}, r"g must have 4 dimensions \[B, T, H, K\], got \[2, 6, 2\]"),
        ({"k": torch.randn(B, T, H, K).bfloat16()}, "q, k and v must have one dtype"),
        ({"g": -torch.rand(B, T + 1, H, K)}, r"g must agree with q in \[B, T\] = \[2, 6\], got \[2, 7\]"),
        ({"g": -torch.rand(B, T, 1, K)}, "g must have k's 2 heads, got 1"),
        ({"g": -torch.rand(B, T, H, 2)}, "one gate for each of the K = 3 dimensions of a key, or 1 .*, got 2"),
        ({"q": torch.randn(B, T, 3, K)}, "H must divide the number of query heads HQ"),
        ({"q": torch.randn(B, T, HQ, 4)}, "q and k must have one head dimension K"),
        ({"v": torch.randn(B, T, H, 0)}, "K and V must be at least 1, got K = 3, V = 0"),
        ({"g": torch.rand(B, T, H, K)}, "g is a log forget gate and must be ≤ 0"),
        ({"scale": float("nan")}, "scale must be a finite Python number"),
        ({"initial_state": torch.zeros(B, H, V, K)}, r"initial_state must have shape \[N, H, K, V\] = \[2, 2, 3, 5\]"),
        (
            {"initial_state": torch.zeros(B, H, K, V).bfloat16()},
            "initial_state must be torch.float32 for torch.float32",
        ),
        ({"initial_state": (torch.zeros(B, H, K, V),)}, "initial_state must have shape .*, got tuple"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "the batch dimension must be 1"),
        ({"backend": "chunck"}, "Did you mean 'chunk'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        gated_linear_attention(**arguments(**change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(B, T, HQ, K)}, r"q must have 3 dimensions \[B, HQ, K\]"),
        ({"g": -torch.rand(B, H, 2)}, "one gate for each of the K = 3"),
        ({"state": None}, r"state must have shape \[N, H, K, V\] = \[2, 2, 3, 5\], got NoneType"),
        ({"scale": "1"}, "scale must be a finite"),
    ],
)
def test_refused_steps(change, words):
    token = {name: x[:, 0] for name, x in arguments().items()} | {"state": torch.zeros(B, H, K, V)} | change
    with pytest.raises(UsageError, match=words):
        gated_linear_attention_step(**token)
