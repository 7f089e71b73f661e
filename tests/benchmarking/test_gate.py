"""Right implementations pass, wrong ones do not, whatever it is that is wrong."""

import re
from dataclasses import replace

import pytest
import torch

from flash_gsa.benchmarking import gate, measurements
from flash_gsa.benchmarking.implementations import Softmax, implementation, layer_inputs, measured_dtype
from flash_gsa.benchmarking.shapes import Shape
from flash_gsa.ops import registry

SHAPE = Shape("gate", B=2, T=300, HQ=2, H=2, K=8, V=8, M=8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    """Small errors are found once a process, and with a small grouped shape in tests."""
    gate._small_errors.cache_clear()
    monkeypatch.setattr(gate, "GROUPED", replace(gate.GROUPED, B=1, K=4, V=4, M=5))
    yield
    gate._small_errors.cache_clear()


def broken(monkeypatch, forward):
    """The backend "chunk" as `forward(right, q, k, v, *rest)`."""
    right = registry._backends["chunk"]

    def wrong(*arguments):
        return forward(right.forward, *arguments)

    monkeypatch.setitem(registry._backends, "chunk", replace(right, forward=wrong))


@pytest.mark.parametrize("name", ["auto", "chunk", "reference", "sdpa-flash"])
def test_right_implementations_pass(name):
    candidate = implementation(name)
    errors = gate.small_errors(candidate, SHAPE, CPU)
    assert errors.problem is None
    assert {"o", "dq", "dk", "dv"} <= errors.found.keys()
    assert ({"dg", "hk", "hv"} <= errors.found.keys()) == candidate.own
    full = gate.full_size_errors(candidate, SHAPE, CPU, gradients=True)
    assert full.problem is None
    assert bool(full.found) == candidate.own


def test_packed_sequences_and_grouped_queries_pass():
    for shape in (replace(SHAPE, B=1, T=90, lengths=(40, 0, 50)), replace(SHAPE, HQ=4)):
        assert gate.small_errors(implementation("chunk"), shape, CPU).problem is None
        assert gate.full_size_errors(implementation("chunk"), shape, CPU, gradients=True).problem is None
    grouped = replace(SHAPE, HQ=4, T=70)
    x = Softmax("sdpa-flash").inputs(grouped, CPU)
    assert x["q"].shape[2] == 2 * x["k"].shape[2]
    assert gate.small_errors(implementation("sdpa-flash"), grouped, CPU).problem is None


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda right, q, k, v, *rest: right(q, k * 1.001, v, *rest), "[a-z]+"),
        (lambda right, q, k, v, *rest: right(q, k.detach() + 0.999 * (k - k.detach()), v, *rest), "dk"),
        (lambda right, q, k, v, *rest: right(q, k * float("nan"), v, *rest), "[a-z]+"),
    ],
    ids=["values", "gradient", "nan"],
)
def test_wrong_ones_do_not(monkeypatch, forward, named):
    broken(monkeypatch, forward)
    problem = gate.small_errors(implementation("chunk"), SHAPE, CPU).problem
    assert problem is not None
    assert re.fullmatch(rf"{named} is off by \S+ of its norm \(allowed: \S+\)", problem)


def test_a_wrong_final_state_alone_is_found(monkeypatch):
    def forward(right, *arguments):
        o, state = right(*arguments)
        return o, state and (state[0], state[1] * 1.01)

    broken(monkeypatch, forward)
    problem = gate.small_errors(implementation("chunk"), SHAPE, CPU).problem
    assert problem is not None
    assert problem.startswith("hv is off by 1.0e-02")


def test_what_is_wrong_only_in_long_sequences_is_found(monkeypatch):
    right = registry._backends["reference"]

    def wrong(q, *rest):
        return right.forward(q * (1.01 if q.shape[1] > 200 else 1), *rest)

    monkeypatch.setitem(registry._backends, "reference", replace(right, forward=wrong))
    candidate = implementation("reference")
    assert gate.small_errors(candidate, SHAPE, CPU).problem is None
    for gradients in (True, False):
        assert gate.full_size_errors(candidate, SHAPE, CPU, gradients).problem is not None


def test_pieces_hand_on_the_state(monkeypatch):
    monkeypatch.setattr(gate, "PIECE", 64)
    errors = gate.full_size_errors(implementation("reference"), SHAPE, CPU, gradients=False)
    assert errors.problem is None
    assert errors.found.keys() == {"o"}


def test_no_speed_without_right_values(monkeypatch):
    record = measurements.measure_shape("cpu", "chunk", SHAPE, 0.01, 2, True, False)
    assert record["problem"] is None
    assert record["forward"]["seconds"] > 0
    gate._small_errors.cache_clear()
    broken(monkeypatch, lambda right, q, k, v, *rest: right(q, k, v * 1.01, *rest))
    record = measurements.measure_shape("cpu", "chunk", SHAPE, 0.01, 2, True, False)
    assert record["problem"].startswith("wrong: ")
    assert record["errors"]
    assert not {"forward", "forward_backward"} & record.keys()


def test_inputs_are_a_trained_layers():
    x = layer_inputs(SHAPE, CPU)
    assert (x["g"] <= 0).all()
    assert x["g"].dtype == torch.float32
    assert x["q"].dtype == measured_dtype(CPU) == torch.float32
    assert measured_dtype(torch.device("cuda")) == torch.bfloat16
    assert torch.equal(x["k"], layer_inputs(SHAPE, CPU)["k"])


def test_gradients_of_float32_gates_are_judged_by_the_format_of_the_inputs():
    exact = {"o": torch.ones(4).double(), "dg": torch.ones(4).double(), "hk": torch.ones(4).double()}
    plain = {name: x.float() for name, x in exact.items()}
    off = {"o": plain["o"].bfloat16(), "dg": plain["dg"] * 1.01, "hk": plain["hk"]}
    assert gate.compare(off, exact, plain).problem is None
    assert "hk is off" in (gate.compare(off | {"hk": plain["hk"] * 1.01}, exact, plain).problem or "")
    assert "dg is off" in (gate.compare(off | {"dg": plain["dg"] * 1.1}, exact, plain).problem or "")
    assert "dg is off" in (gate.compare(off | {"o": plain["o"]}, exact, plain).problem or "")
