import time

import pytest
import torch

from flash_gsa.benchmarking.timing import Stopwatch


def test_the_median_of_many_calls_in_repeats():
    taken = iter([0.05, 0.001, 0.001])

    def call():
        time.sleep(next(taken, 0.002))

    cost = Stopwatch(torch.device("cpu"), budget=0.06, repeats=3).cost(call)
    assert 0.002 <= cost.low <= cost.seconds <= cost.high < 0.05
    assert cost.calls % 3 == 0
    assert cost.calls >= 3
    assert cost.peak_bytes is None


def test_of_calls_longer_than_the_budget_the_second_counts():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.02)

    cost = Stopwatch(torch.device("cpu"), budget=0.01, repeats=3).cost(call)
    assert (len(calls), cost.calls) == (2, 1)
    assert cost.seconds == cost.low == cost.high >= 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_time_and_memory_of_a_copy_on_a_gpu():
    device = torch.device("cuda")
    source = torch.randn(2**26, device=device)
    stopwatch = Stopwatch(device, budget=0.2, repeats=3)
    cost = stopwatch.cost(lambda: source.clone())
    assert cost.peak_bytes == source.nbytes
    assert 2 * source.nbytes / cost.seconds > 1e11
    twice = stopwatch.cost(lambda: (source.clone(), source.clone()))
    assert 1.5 < twice.seconds / cost.seconds < 2.5
    assert twice.peak_bytes == 2 * source.nbytes
