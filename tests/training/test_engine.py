"""Devices and precisions: what is there, and what is refused."""

import math

import pytest
import torch

from flash_gsa.errors import UsageError
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.training.engine import Engine
from flash_gsa.training.recipe import OptimizerSection


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def test_auto_is_fp32_on_a_cpu(with_bf16):
    engine = Engine("cpu")
    assert (engine.device.type, engine.precision) == ("cpu", "fp32")
    with engine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert engine.describe() == f"cpu ({torch.get_num_threads()} threads), fp32"


def test_bf16_on_a_cpu_that_has_it(with_bf16):
    with Engine("cpu", "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_bf16_on_a_cpu_that_would_emulate_it(no_bf16):
    with pytest.raises(UsageError, match=r"precision=bf16 would be emulated.*Use precision=fp32"):
        Engine("cpu", "bf16")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(device, bad):
    """Neither weights nor moments nor their count of steps: as if it had not been."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = GSAConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_heads=1, num_slots=4, intermediate_size=16
    )
    settings = OptimizerSection(lr=1e-2, min_lr=1e-3)

    def run(*factors):
        torch.manual_seed(0)
        engine = Engine(device, "fp32")
        engine.prepare(GSAForCausalLM(config), settings)
        outcomes = []
        for factor in factors:
            losses = [engine.accumulate(lambda m, x: x * m.lm_head.weight.square().mean(), factor, last=True)]
            if bad == "gradient" and math.isnan(factor):
                losses = [torch.ones_like(losses[0])]
            outcomes.append(engine.update(losses, 1e-2, 1.0, seconds=0.0, stop=False))
        return outcomes, {name: piece.tensor.clone() for name, piece in engine.pieces().items()}

    outcomes, found = run(1.0, float("nan"), 2.0)
    assert [outcome.finite for outcome in outcomes] == [True, False, True]
    _, expected = run(1.0, 2.0)
    assert len(found) > 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["tpu", "cpu0", "mps", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UsageError, match=f"device='?{name}'? is not"):
        Engine(name)


def test_random_state_and_memory():
    engine = Engine("cpu")
    state = engine.random_state()
    first = torch.rand(3)
    engine.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
    assert 10**7 < engine.peak_memory() < 10**12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("Another GPU", None),
    ],
)
def test_peak_by_the_devices_name(monkeypatch, name, peak):
    engine = Engine("cpu")
    assert engine.peak_flops() is None
    engine.device, engine.precision = torch.device("cuda"), "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert engine.peak_flops() == peak
    engine.precision = "fp32"
    assert engine.peak_flops() is None


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    engine = Engine()
    assert (engine.device.type, engine.precision) == ("cuda", "bf16")
    tensor = torch.ones(2, 2, device=engine.device)
    with engine.autocast():
        assert (tensor @ tensor).dtype == torch.bfloat16
    assert engine.peak_memory() > 0
