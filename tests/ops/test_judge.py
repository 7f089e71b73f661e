"""The judge of the GPU tests is itself judged: its truth against the recurrence, its verdict by what it lets pass."""

from dataclasses import replace

import pytest
import torch

from . import test_linear as linear
from .helpers import Case, call, make, oracle, rounded, with_gradients
from .judge import by_states, distance, linear_results, linear_verdict, plain, truth, truth_and_sums, verdict

CASES = [
    Case(T=40, HQ=4, H=2, scale=0.7),
    Case(T=40, HQ=2, H=1, strength=True),
    Case(T=33, state=False),
    Case(lengths=(0, 17, 1, 0, 30), HQ=4, H=2, strength=True),
    Case(lengths=(0, 0)),
]


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_truth_is_the_recurrence(case, strong):
    x = make(case)
    if strong and case.T:
        x["g"][:, 3], x["g"][:, 9, :, 2], x["g"][:, 20:, 0] = -1e30, float("-inf"), -70.0
    wanted = oracle(x, case, torch.float64)
    for found in (truth(x, case), truth_and_sums(x, case, final=True)[0]):
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_by_states_is_the_recurrence(case):
    x = {name: y.double() for name, y in make(case).items()}
    wanted = oracle(x, case, torch.float64)
    found = plain(x, case, maths=by_states)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", [Case(T=40, HQ=4, H=2, scale=0.7), *CASES[2:]], ids=str)
@pytest.mark.parametrize("one_gate", [False, True])
def test_the_truth_of_gated_linear_attention_is_the_recurrence(case, one_gate):
    x = {name: y.double() for name, y in linear.make(case, one_gate=one_gate).items()}
    if case.T:
        x["g"][:, 3], x["g"][:, 20:, 0] = -1e30, -70.0
    found = linear_results(x, case, torch.float64)
    wanted = linear.with_gradients(lambda z: linear.recurrence(z, case, torch.float64), x)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-11, atol=1e-11, msg=name)


def test_plain_loses_what_its_format_loses():
    case = Case(T=64, HQ=4, H=2, K=32, V=32, M=16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = rounded(make(case), dtype)
        exact, eps = truth(x, case), torch.finfo(dtype).eps
        for name, y in plain(x, case).items():
            assert y.dtype == (dtype if name in ("o", "dq", "dk", "dv") else torch.float32)
            assert eps / 50 < distance(y, exact[name]) < 4 * eps, (dtype, name)


CASE = Case(T=70, HQ=4, H=2, K=32, V=32, M=16)


def spoiled(which: str, dtype: torch.dtype):
    """Results and gradients of `chunk` with one thing a few per cent wrong, and its inputs."""
    x = rounded(make(CASE), dtype)

    def backend(z):
        if which == "gates":
            z = z | {"g": z["g"] * 1.03}
        o, hk, hv = call("chunk", z, CASE)
        if which == "state":
            hk = hk.bfloat16().float() if dtype == torch.float32 else hk * 1.01
        return o, hk, hv

    result = with_gradients(backend, x)
    if which in result:
        result[which] = result[which] * 1.02
    if which == "causality":
        result["o"][:, 1:] += result["o"][:, :-1] * 0.02
    if which == "nan":
        result["dg"][0, 0, 0, 0] = float("nan")
    return result, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verdict_lets_the_right_pass(dtype):
    verdict(*spoiled("nothing", dtype), CASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["gates", "state", "o", "dq", "dk", "dv", "dg", "dhk", "dhv", "causality", "nan"])
def test_the_verdict_refuses_the_wrong(which, dtype):
    with pytest.raises(AssertionError, match="not finite" if which == "nan" else "error"):
        verdict(*spoiled(which, dtype), CASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verdict_where_states_add_up(dtype):
    case = replace(CASE, strength=True)
    x = rounded(make(case), dtype)
    x["g"].zero_()
    result = with_gradients(lambda z: call("chunk", z, case), x)
    verdict(result, x, case, add_up=True)
    for name in ("o", "hk", "dq", "dv", "dhv"):
        with pytest.raises(AssertionError, match=f"{name}: error"):
            verdict(result | {name: result[name] * 1.1}, x, case, add_up=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verdict_where_there_is_one_slot(dtype):
    """What is lost in sums over time leaves dg less exact there; a few per cent are seen all the same."""
    case = replace(CASE, M=1)
    x = rounded(make(case), dtype)
    result = with_gradients(lambda z: call("chunk", z, case), x)
    verdict(result, x, case)
    for name in ("o", "hk", "hv", "dv", "dg", "dhv"):
        with pytest.raises(AssertionError, match=f"{name}: error"):
            verdict(result | {name: result[name] * 1.04}, x, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verdict_on_gated_linear_attention(dtype):
    x = rounded(linear.make(CASE), dtype)
    result = linear.run("chunk", x, CASE)
    linear_verdict(result, x, CASE)
    for name, y in result.items():
        with pytest.raises(AssertionError, match=f"{name}: error"):
            linear_verdict(result | {name: y * 1.03}, x, CASE)
