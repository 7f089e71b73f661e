"""Gates and scores at the edges of float32: always finite, and as accurate as for gentle ones."""

import pytest
import torch

from . import judge
from .helpers import EPS, Case, call, check, make, oracle, rounded, run

CASE = Case(T=132, B=1, HQ=2, H=1, K=6, V=5, M=4)
PLACES = (0, 20, 63, 64, 100, 127, 131)  # first, middle and last of chunks of 32 and 64, and of the sequence


def gates(name: str, g: torch.Tensor) -> torch.Tensor:
    """Gentle gates g [B, T, H, M] made extreme in the way called `name`."""
    g = g.clone()
    t = torch.arange(g.shape[1])
    kind, _, value = name.partition(" ")
    number = float(value or 0)
    if kind == "all":
        g[:] = number
    elif kind == "alternating":
        g[:, t % 2 == 0] = number
    elif kind == "slot":
        g[..., 1] = number
    elif kind == "one-in-a-slot":
        g[:, 20, :, 2] = number
    elif kind == "ramp":
        g[:] = -(torch.linspace(0, 8, g.shape[1])[None, :, None, None] ** 2)
    else:
        g[:, int(kind)] = number
    return g


NAMES = [
    *(
        f"all {value}"
        for value in ("0", "-1e-40", "-1e-6", "-1e-3", "-1", "-5", "-50", "-1e4", "-1e30", "-3e38", "-inf")
    ),
    *(f"alternating {value}" for value in ("-0.9", "-50", "-1e30")),
    *(f"slot {value}" for value in ("0", "-2", "-50", "-3e38")),
    *(f"one-in-a-slot {value}" for value in ("-50", "-1e4", "-1e30", "-inf")),
    *(f"{place} -3e38" for place in PLACES),
    *(f"20 {value}" for value in ("-55", "-60.1", "-88", "-104", "-1e4", "-1e30")),
    "ramp",
]


@pytest.mark.parametrize("name", NAMES)
def test_strong_gates(backend, device, name):
    x = make(CASE)
    x["g"] = gates(name, x["g"])
    # A GPU's exp is off by a unit, and the recurrence multiplies by the same one at every token.
    units = CASE.T if (backend, device.type) == ("reference", "cuda") else 8
    check(run(backend, x, CASE, device), x, CASE, units=units)


@pytest.mark.parametrize("name", ["all -50", "alternating -1e30", "9 -55", "slot -3e38"])
@pytest.mark.parametrize(
    "case", [Case(T=17, strength=True), Case(lengths=(70, 0, 1, 66), strength=True), Case(T=100, state=False)], ids=str
)
def test_strong_gates_with_strengths_packing_and_no_state(backend, device, name, case):
    x = make(case)
    x["g"] = gates(name, x["g"])
    # A sum of gates near -55, rounded to float32, moves its exponential by 55 half units; a product takes two of them.
    check(run(backend, x, case, device), x, case, units=8 if backend == "triton" else 8 + 55)


@pytest.mark.parametrize("name", ["all -50", "20 -3e38"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strong_gates_with_16_bit_inputs(backend, device, name, dtype):
    x = rounded(make(CASE), dtype)
    x["g"] = gates(name, x["g"])
    if backend == "triton":  # its products are of 16-bit factors
        judge.verdict(run(backend, x, CASE, device), x, CASE)
    else:
        check(run(backend, x, CASE, device), x, CASE)


@pytest.mark.parametrize("name", ["all -0.01", "all -50", "alternating -1e30"])
def test_saturated_softmax(backend, device, name):
    x = make(CASE)
    x["g"] = gates(name, x["g"])
    x["q"] = x["q"] * 1e4
    result = run(backend, x, CASE, device)
    exact, plain = oracle(x, CASE, torch.float64), oracle(x, CASE, torch.float32)
    # A score of 1e4 is known to about 1e-3 in float32, so where two slots are that close their order is not.
    size = 1e4 * EPS
    moved = (exact["dv"] * x["v"]).norm()
    for key, y in result.items():
        assert y.isfinite().all(), f"{key} is not finite"
        error = (y - exact[key]).norm()
        scale = exact[key].norm() + (moved if key.startswith("d") else 0)
        assert error <= 2 * (plain[key] - exact[key]).norm() + size * scale, key


def test_strengths_far_from_one_minus_the_gate(backend, device):
    x = make(Case(T=130, strength=True))
    x["s"] = 100 * x["s"] - 50
    x["g"] = 20 * x["g"]
    case = Case(T=130, strength=True, scale=0.01)
    check(run(backend, x, case, device), x, case)


def test_a_wiped_slot_holds_its_last_token_only(backend, device):
    x = make(CASE)
    x["g"][:, 77] = -3e38
    o, hk, hv = call(backend, {n: y.to(device) for n, y in x.items()}, CASE)
    # After the wipe every slot holds k_77, so scores are equal and o is the value itself.
    torch.testing.assert_close(o[:, 77].cpu(), x["v"][:, 77].expand(-1, CASE.HQ, -1), rtol=4 * EPS, atol=4 * EPS)
    other = {n: y.clone() for n, y in x.items()}
    for name in "qkv":
        other[name][:, :77] = 5.0
    after = call(backend, {n: y.to(device) for n, y in other.items()}, CASE)
    torch.testing.assert_close(o[:, 77:], after[0][:, 77:], rtol=0, atol=16 * EPS)
    torch.testing.assert_close((hk, hv), after[1:], rtol=0, atol=16 * EPS)
