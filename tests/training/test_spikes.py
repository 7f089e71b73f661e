"""What counts as a loss spike."""

import json
import random
from dataclasses import astuple

import pytest

from flash_gsa.training.spikes import DEVIATIONS, LEAST, SMALLEST_RISE, WINDOW, SpikeDetector


def noisy(steps, seed=0, start=3.0, slope=0.0, noise=0.05):
    chance = random.Random(seed)
    return [start + slope * n + chance.gauss(0, noise) for n in range(steps)]


def seen(losses, detector=None):
    """{index: spike}"""
    detector = detector or SpikeDetector()
    return {i: spike for i, loss in enumerate(losses) if (spike := detector.see(loss))}


def test_noise_and_a_falling_loss_are_no_spikes():
    assert seen(noisy(5000)) == {}
    assert seen(noisy(5000, slope=-0.0005)) == {}
    assert seen([10 * 0.99**n for n in range(1000)]) == {}


def test_a_spike_is_told_with_what_was_expected():
    losses = [2.0, 2.2] * 50 + [4.0]
    ((step, spike),) = seen(losses).items()
    assert step == 100
    assert astuple(spike) == pytest.approx((4.0, 2.1, 2.1 + DEVIATIONS * 0.1))
    assert seen([2.0, 2.2] * 50 + [2.59]) == {}


def test_one_that_lasts_is_told_once_and_becomes_what_is_expected():
    losses = noisy(200) + noisy(300, seed=1, start=6.0) + [9.0]
    assert list(seen(losses)) == [200, 500]
    again = noisy(200) + [6.0] * 3 + noisy(100, seed=2) + [6.0]
    assert list(seen(again)) == [200, 303]  # the first hardly widened the limit


def test_small_rises_and_the_first_steps_do_not_count():
    even = [1.0] * WINDOW
    assert seen([*even, 1.0 + 0.99 * SMALLEST_RISE]) == {}
    assert list(seen([*even, 1.0 + 1.01 * SMALLEST_RISE])) == [WINDOW]
    assert seen([1.0] * (LEAST - 1) + [50.0]) == {}


def test_a_resumed_detector_goes_on_as_if_nothing_had_happened():
    losses = [*noisy(150), 7.0, 7.0, *noisy(60, seed=3), 7.0]
    for cut in (10, 151, 152, 200):
        first, second = SpikeDetector(), SpikeDetector()
        before = seen(losses[:cut], first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = {cut + i: spike for i, spike in seen(losses[cut:], second).items()}
        assert before | after == seen(losses)
