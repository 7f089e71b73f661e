"""Devices and precisions: what is there, and what is refused."""

import pytest
import torch

from flash_gsa.errors import UsageError
from flash_gsa.training.engine import Engine


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
    engine = Engine()
    assert (engine.device.type, engine.precision) == ("cuda", "bf16")
    tensor = torch.ones(2, 2, device=engine.device)
    with engine.autocast():
        assert (tensor @ tensor).dtype == torch.bfloat16
    assert engine.peak_memory() > 0
