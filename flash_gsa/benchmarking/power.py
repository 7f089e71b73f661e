"""Watts and clocks of a GPU while something runs on it: what says whether its power limit holds it back.

Read through NVIDIA's management library by its package nvidia-ml-py, if that is installed.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

INTERVAL = 0.02
"""Seconds between two looks."""


@contextmanager
def metered(device: torch.device) -> Iterator[dict[str, Any]]:
    """What the card did within it: filled in at its end, empty on a CPU or without nvidia-ml-py.

    The device must have nothing to do at the beginning and at the end. Then `joules` (by the card's own counter, which
    advances in steps of some 20 ms) over `seconds` are the mean `watts`. Of the `looks` in between: `sm_mhz`, the
    median of the multiprocessors' clock, and `power_capped`, the share in which the driver said that the power limit
    lowers it. `limit_watts` and `most_sm_mhz` are the card's limits.
    """
    found: dict[str, Any] = {}
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        nvml = None
    if nvml is None or device.type != "cuda":
        yield found
        return
    clocks: list[int] = []
    capped: list[bool] = []
    over = threading.Event()

    def look() -> None:
        clocks.append(nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
        capped.append(bool(reasons & nvml.nvmlClocksThrottleReasonSwPowerCap))

    def look_again() -> None:
        with suppress(nvml.NVMLError):
            while not over.wait(INTERVAL):
                look()

    try:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        limits = nvml.nvmlDeviceGetEnforcedPowerLimit(card), nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_SM)
        look()
        before, start = nvml.nvmlDeviceGetTotalEnergyConsumption(card), time.perf_counter()
    except nvml.NVMLError:  # a part of a card, say, that does not tell
        yield found
        return
    clocks.clear()
    capped.clear()
    looking = threading.Thread(target=look_again, name="power", daemon=True)
    looking.start()
    try:
        yield found
    finally:
        seconds, joules = time.perf_counter() - start, None
        with suppress(nvml.NVMLError):  # a card that stops telling has not been measured
            joules = (nvml.nvmlDeviceGetTotalEnergyConsumption(card) - before) / 1e3
        over.set()
        looking.join()
    if clocks and joules is not None:
        found |= {
            "seconds": seconds,
            "joules": joules,
            "watts": joules / seconds,
            "limit_watts": limits[0] / 1e3,
            "sm_mhz": statistics.median(clocks),
            "most_sm_mhz": limits[1],
            "power_capped": sum(capped) / len(capped),
            "looks": len(clocks),
        }
