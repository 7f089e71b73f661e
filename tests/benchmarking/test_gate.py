"""Right implementations pass, wrong ones do not, whatever it is that is wrong."""

import re
from dataclasses import replace

import pytest
import torch

from flash_gsa.benchmarking import gate, implementations, measurements
from flash_gsa.benchmarking.implementations import Softmax, implementation, layer_inputs, measured_dtype
from flash_gsa.benchmarking.rounded import rounded_products
from flash_gsa.benchmarking.shapes import Shape
from flash_gsa.benchmarking.timing import Stopwatch
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


def broken(monkeypatch, forward, name="chunk"):
    """The backend "chunk" as `forward(right, q, k, v, *rest)`; under another name, one that differs so from it."""
    right = registry._backends["chunk"]

    def wrong(*arguments):
        return forward(right.forward, *arguments)

    monkeypatch.setitem(registry._backends, name, replace(right, name=name, forward=wrong))


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Inputs as on a GPU."""
    monkeypatch.setattr(implementations, "measured_dtype", lambda device: torch.bfloat16)


@pytest.mark.parametrize("name", ["auto", "recompute", "chunk", "reference", "sdpa-flash"])
def test_right_implementations_pass(name):
    candidate = implementation(name)
    errors = gate.small_errors(candidate, SHAPE, CPU)
    assert errors.problem is None
    assert {"o", "dq", "dk", "dv"} <= errors.found.keys()
    assert ({"dg", "hk", "hv"} <= errors.found.keys()) == candidate.own
    full = gate.full_size_errors(candidate, SHAPE, CPU, gradients=True)
    assert full.problem is None
    assert bool(full.found) == candidate.own


@pytest.mark.parametrize("name", ["auto", "reference", "sdpa-flash"])
def test_right_ones_pass_in_16_bits_by_the_loss_of_their_products(name, in_bfloat16):
    shape = replace(SHAPE, K=64, V=64)
    found = gate.small_errors(implementation(name), shape, CPU)
    full = gate.full_size_errors(implementation(name), shape, CPU, gradients=True)
    assert found.problem is full.problem is None
    # Not less than half a unit, and not much more than what is lost.
    assert all(2**-8 < limit < 0.05 for limit in (limit for name, (_, limit) in found.found.items() if name[0] != "h"))
    assert all(limit < 2**-8 for name, (_, limit) in found.found.items() if name[0] == "h")


def test_two_percent_are_too_much_in_16_bits(monkeypatch, in_bfloat16):
    broken(monkeypatch, lambda right, q, k, v, *rest: right(q, k, v * 1.02, *rest), "other")
    for errors in (
        gate.small_errors(implementation("other"), SHAPE, CPU),
        *(gate.full_size_errors(implementation("other"), SHAPE, CPU, gradients) for gradients in (True, False)),
    ):
        assert re.match("(o|dv|hv) is off by 2", errors.problem or "")


def test_what_judges_in_16_bits_is_judged_itself(monkeypatch, in_bfloat16):
    broken(monkeypatch, lambda right, q, k, v, *rest: right(q, k * 1.001, v, *rest))
    with pytest.raises(AssertionError, match="the chunkwise form is wrong"):
        gate.small_errors(implementation("reference"), SHAPE, CPU)


def test_products_take_rounded_factors_in_both_directions():
    x, y, dz = torch.randn(3, 5, 7), torch.randn(3, 7, 4), torch.randn(3, 5, 4)

    def rounded(x):
        return x.bfloat16().float()

    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    with rounded_products(torch.bfloat16):
        z = torch.einsum("nij,njk->nik", *leaves) + (leaves[0] @ leaves[1]) * 2
        dx, dy = torch.autograd.grad(z, leaves, dz)
    torch.testing.assert_close(z, 3 * rounded(x) @ rounded(y))
    torch.testing.assert_close(dx, (rounded(dz) + rounded(2 * dz)) @ rounded(y).mT)
    torch.testing.assert_close(dy, rounded(x).mT @ (rounded(dz) + rounded(2 * dz)))
    assert not torch.equal(x @ y, rounded(x) @ rounded(y))
    torch.testing.assert_close(torch.einsum("nij,njk->nik", x, y), x @ y)


def test_others_may_lose_more():
    exact = {"o": torch.ones(100).double()}
    plain = {"o": exact["o"].float() + 1e-3 * torch.randn(100)}
    off = {"o": (exact["o"] + 2.5 * (plain["o"] - exact["o"])).float()}
    assert "o is off" in (gate.compare(off, exact, plain, gate.TIMES).problem or "")
    assert gate.compare(off, exact, plain, gate.TIMES_OTHERS).problem is None
    assert gate._times(implementation("auto")) < gate._times(implementation("fla"))


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

    def wrong_output(q, *rest):
        return right.forward(q * (1.01 if q.shape[1] > 200 else 1), *rest)

    def wrong_state(q, *rest):
        o, state = right.forward(q, *rest)
        return o, state and (state[0], state[1] * (1.01 if q.shape[1] > 200 else 1))

    candidate = implementation("reference")
    for wrong, named in ((wrong_output, "(o|dq|dk|dg) is off"), (wrong_state, "hv is off by 1.0e-02")):
        monkeypatch.setitem(registry._backends, "reference", replace(right, forward=wrong))
        assert gate.small_errors(candidate, SHAPE, CPU).problem is None
        for gradients in (True, False):
            problem = gate.full_size_errors(candidate, SHAPE, CPU, gradients).problem
            assert re.match(named, problem or "")


def test_pieces_hand_on_the_state(monkeypatch):
    monkeypatch.setattr(gate, "PIECE", 64)
    errors = gate.full_size_errors(implementation("reference"), SHAPE, CPU, gradients=False)
    assert errors.problem is None
    assert errors.found.keys() == {"o", "hk", "hv"}


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
    off = {"o": plain["o"].bfloat16(), "dg": plain["dg"] * 1.003, "hk": plain["hk"]}
    assert gate.compare(off, exact, plain).problem is None
    assert "hk is off" in (gate.compare(off | {"hk": plain["hk"] * 1.01}, exact, plain).problem or "")
    assert "dg is off" in (gate.compare(off | {"dg": plain["dg"] * 1.01}, exact, plain).problem or "")
    assert "dg is off" in (gate.compare(off | {"o": plain["o"]}, exact, plain).problem or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["auto", "recompute", "sdpa-flash"])
def test_right_implementations_pass_on_a_gpu(name):
    shape = Shape("gate", B=2, T=512, HQ=4, H=4, K=128, V=128, M=64)
    device, candidate = torch.device("cuda"), implementation(name)
    assert gate.small_errors(candidate, shape, device).problem is None
    for gradients in (True, False):
        assert gate.full_size_errors(candidate, shape, device, gradients).problem is None


def test_what_cannot_be_captured_is_told(monkeypatch):
    def captured(run, place):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(measurements, "captured", captured)
    record = {"forward": {}}
    calls = dict.fromkeys(("forward", "forward_backward"), lambda: None)
    cpu = torch.device("cpu")
    measurements.add_graph(record, calls, Stopwatch(cpu, 0.01, 1), cpu)
    assert record == {"forward": {}, "graph_problem": "operation not permitted when stream is capturing"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_times_in_a_graph_on_a_gpu():
    shape = Shape("gate", B=1, T=512, HQ=4, H=4, K=128, V=128, M=64)
    record = measurements.measure_shape("cuda", "auto", shape, 0.05, 2, False, False, True)
    assert record["problem"] is None
    for label, in_graph in record["in_graph"].items():
        # A graph waits for no launches; what is left is the device's, and noise.
        assert 0 < in_graph["seconds"] < 1.5 * record[label]["seconds"]
        assert in_graph["peak_bytes"] is None
