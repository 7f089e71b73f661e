"""Layers and what surrounds their operator: right ones are timed, wrong ones are not, and separate is separate."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import GatedSlotAttention
from flash_gsa.benchmarking import implementations, layer
from flash_gsa.benchmarking.shapes import Shape
from flash_gsa.layers import linears
from flash_gsa.ops import gates, pointwise
from flash_gsa.ops.pointwise import silu_norm

SHAPE = Shape("layer", B=2, T=90, HQ=4, H=2, K=8, V=8, M=6)
CPU = torch.device("cpu")
RESULTS = {
    "layer": {"y", "dx", "dg_norm.weight", *(f"d{n}_proj.weight" for n in "qkvfo")},
    "projections": {"q", "k", "v", "f", "y", "dx", "do", *(f"d{n}_proj.weight" for n in "qkvfo")},
    "silu": {"q_out", "k_out", "v_out", "dq", "dk", "dv"},
    "gates": {"g", "df"},
    "abc_gates": {"g", "s", "df"},
    "norm": {"y", "do", "dw"},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request, monkeypatch):
    """The format layers are measured in: that of a CPU, and that of a GPU."""
    monkeypatch.setattr(layer, "measured_dtype", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("operation", RESULTS)
def test_right_values_are_timed(operation, dtype):
    record = layer.measure_layer("cpu", "auto", SHAPE, operation, 0.01, 2)
    assert "problem" not in record
    assert record["errors"].keys() == RESULTS[operation]
    assert 0 < max(distance for distance, _ in record["errors"].values()) < 16 * torch.finfo(dtype).eps
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    assert record["backend"] == ("chunk" if operation == "layer" else None)
    assert min(record[passes]["seconds"] for passes in ("forward", "forward_backward")) > 0
    assert ("least_bytes" in record["forward"]) == (operation in layer.SURROUNDINGS)


def values(y):
    return 1.1 * y


def gradient(y):
    return y.detach() + 1.1 * (y - y.detach())


def nan(y):
    return y * float("nan")


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        *(("layer", wrong) for wrong in (values, gradient)),  # the operator refuses NaN on a CPU
        *((operation, wrong) for operation in layer.SURROUNDINGS for wrong in (values, gradient, nan)),
    ],
)
def test_no_times_for_wrong_kernels(operation, wrong, dtype, monkeypatch):
    """Only what is fused is wrong: as separate operations the same is right, and timed."""
    kernels = SimpleNamespace(
        silu_each=lambda q, k, v: (F.silu(q), F.silu(k), wrong(F.silu(v))),
        log_gates=lambda f, tau: wrong(F.logsigmoid(f.float()) / tau),
        silu_norm=lambda o, w, eps: wrong(F.rms_norm(F.silu(o), w.shape, w, eps)),
    )
    monkeypatch.setattr(pointwise, "kernels", kernels)
    monkeypatch.setattr(gates, "kernels", SimpleNamespace(abc_gates=wrong_abc_gates(wrong)))
    # The map after the norm needs more of the kernels than what is wrong here.
    monkeypatch.setattr(linears, "silu_norm_linear", lambda o, w, eps, map: F.linear(silu_norm(o, w, eps), map))
    for module in (pointwise, gates, layer):
        monkeypatch.setattr(module, "runs_on", lambda x: x.dtype != torch.float64)
    record = layer.measure_layer("cpu", "auto", SHAPE, operation, 0.01, 2)
    assert record["problem"].startswith("wrong: ")
    assert record["errors"]
    assert not {"forward", "forward_backward"} & record.keys()
    if operation != layer.ABC:
        assert "forward" in layer.measure_layer("cpu", "separate", SHAPE, operation, 0.01, 2)


def wrong_abc_gates(wrong):
    def wrong_gates(logits, initial, cu_seqlens):
        g, s = gates._gates(logits.float(), gates._running(logits.float(), initial, cu_seqlens)[0])
        return g, wrong(s), None

    return wrong_gates


def test_where_nothing_is_fused_separate_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(layer, "runs_on", lambda x: False)
    record = layer.measure_layer("cpu", "separate", SHAPE, "layer", 0.01, 2)
    assert record == {"problem": "not run: nothing is fused here, so it is what auto runs"}


def test_the_bytes_are_those_of_the_tensors():
    tokens = 2 * 90
    q, k, v, o, f, w = (4 * n for n in (tokens * 32, tokens * 16, tokens * 16, tokens * 32, tokens * 12, 32))
    around = (("silu", q + k + v, q + k + v), ("gates", f, f), ("abc_gates", f, 2 * f), ("norm", o + w, o))
    for operation, read, written in around:
        forward, both = layer.least_bytes(layer.subject(operation, "auto", SHAPE, CPU))
        assert forward == read + written, operation
        # The backward reads both inputs and gradients of results, and writes those of inputs.
        assert both == forward + (read + written) + read, operation


def test_fla_gets_our_weights_and_is_judged_with_its_own_gates(dtype, monkeypatch):
    class Theirs(GatedSlotAttention):
        """Gates and write strengths in the layer's format, and three results."""

        def _gates(self, logits, *rest):
            g = F.logsigmoid(logits) / self.gate_logit_normalizer
            return g, (1 - g.exp()).to(logits.dtype)

        def forward(self, x):
            return super().forward(x), None, None

    module = ModuleType("fla.layers.gsa")
    module.GatedSlotAttention = Theirs
    monkeypatch.setitem(sys.modules, "fla.layers.gsa", module)
    monkeypatch.setattr(implementations.Fla, "reason_against", lambda *rest: None)
    shape = replace(SHAPE, H=4)
    record = layer.measure_layer("cpu", "fla", shape, "layer", 0.01, 2)
    assert "problem" not in record
    assert record["backend"] is None
    assert record["forward"]["seconds"] > 0
    ours, theirs = (layer.subject("layer", name, shape, CPU) for name in ("auto", "fla"))
    assert all(torch.equal(x, theirs.inputs[name]) for name, x in ours.inputs.items())
    torch.testing.assert_close(theirs.function(), ours.function(), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["auto", "separate"])
@pytest.mark.parametrize("operation", RESULTS)
def test_on_a_gpu(operation, name):
    shape = Shape("layer", B=2, T=512, HQ=4, H=4, K=128, V=128, M=64)
    record = layer.measure_layer("cuda", name, shape, operation, 0.05, 2)
    assert "problem" not in record
    assert record["errors"].keys() == RESULTS[operation]
    assert 0 < record["forward"]["seconds"] < record["forward_backward"]["seconds"]
    assert (record["forward_backward"]["peak_bytes"] is None) == (operation in layer.SURROUNDINGS)
