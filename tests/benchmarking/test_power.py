"""Watts and clocks, of a card that is made up."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flash_gsa.benchmarking import power

GPU = torch.device("cuda", 0)


class Card:
    """700 W at 1,410 MHz, held back by its power limit every other time that one looks."""

    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 4

    class NVMLError(Exception):
        pass

    def __init__(self, tells=True):
        self.tells, self.looked, self.began = tells, 0, time.perf_counter()

    def nvmlInit(self):
        if not self.tells:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-the-card"
        return "card"

    def nvmlDeviceGetTotalEnergyConsumption(self, card):
        return 700e3 * (time.perf_counter() - self.began)

    def nvmlDeviceGetClockInfo(self, card, which):
        self.looked += 1
        assert (card, which) == ("card", 1)
        return 1410 if self.looked % 3 else 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card):
        return 5 if self.looked % 2 else 1

    def nvmlDeviceGetEnforcedPowerLimit(self, card):
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, card, which):
        return 1980


def with_card(monkeypatch, card):
    module = ModuleType("pynvml")
    for name in dir(card):
        if not name.startswith("__"):
            setattr(module, name, getattr(card, name))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="the-card"))


def test_what_the_card_draws_and_at_which_clock(monkeypatch):
    with_card(monkeypatch, Card())
    with power.metered(GPU) as found:
        time.sleep(0.5)
        assert not found
    assert 0.5 <= found["seconds"] < 5
    assert found["watts"] == pytest.approx(700, rel=0.1)
    assert found["joules"] == pytest.approx(found["watts"] * found["seconds"])
    assert (found["sm_mhz"], found["most_sm_mhz"], found["limit_watts"]) == (1410, 1980, 700)
    assert found["looks"] > 5
    assert found["power_capped"] == pytest.approx(0.5, abs=0.2)


def test_what_goes_wrong_inside_stays_what_is_raised(monkeypatch):
    with_card(monkeypatch, Card())
    with pytest.raises(ZeroDivisionError), power.metered(GPU):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("why", ["a CPU", "not installed", "does not tell"])
def test_without_a_meter_nothing_is_found(why, monkeypatch):
    with_card(monkeypatch, Card(tells=why != "does not tell"))
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with power.metered(torch.device("cpu") if why == "a CPU" else GPU) as found:
        pass
    assert found == {}


@pytest.mark.parametrize("what", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetClockInfo"])
def test_a_card_that_stops_telling_is_not_measured(what, monkeypatch):
    with_card(monkeypatch, Card())
    with power.metered(GPU) as found:
        monkeypatch.setattr(sys.modules["pynvml"], what, lambda *_: Card(tells=False).nvmlInit())
        time.sleep(0.1)
    assert found == {}


@pytest.mark.gpu
def test_a_card_that_is_there():
    pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with power.metered(torch.device("cuda", torch.cuda.current_device())) as found:
        for _ in range(2000):
            x @ x
        torch.cuda.synchronize()
    assert 50 < found["watts"] < 1.2 * found["limit_watts"]
    assert 0 < found["sm_mhz"] <= found["most_sm_mhz"]
