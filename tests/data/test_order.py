"""Permutations and mixtures: one to one, exact, and without order where there should be none."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data.order import Mixture, Permutation
from flash_gsa.errors import UsageError


@given(st.integers(1, 5000), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_permutation_hits_every_place_once(size, seed):
    assert sorted(Permutation(size, [seed])(np.arange(size)).tolist()) == list(range(size))


def test_places_of_a_very_large_permutation_at_once():
    size = 10**13 + 7
    permutation = Permutation(size, [1])
    places = np.random.default_rng(0).integers(size, size=1000)
    found = permutation(places)
    assert len(np.unique(found)) == len(np.unique(places))
    assert (found[3], found[999]) == tuple(permutation(places[[3, 999]]))
    assert found.min() >= 0
    assert found.max() < size
    # Spread evenly: the mean of 1000 uniform numbers is within five standard deviations of the middle.
    assert abs(found.mean() / size - 0.5) < 5 / np.sqrt(12 * 1000)


def test_neighbours_do_not_stay_neighbours_and_seeds_differ():
    first, other = (Permutation(4000, [seed])(np.arange(4000)).tolist() for seed in (0, 1))
    assert sum(abs(b - a) == 1 for a, b in pairwise(first)) < 20
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 20


weights = st.lists(st.floats(0.05, 5), min_size=1, max_size=7)


@given(weights, st.integers(0, 9), st.integers(0, 10**12), st.integers(1, 400))
@settings(deadline=None, max_examples=80)
def test_every_stretch_holds_the_sources_by_weight(weights, seed, start, count):
    mixture = Mixture(weights, [seed])
    source, place = mixture(np.arange(start, start + count))
    before, after = mixture.counts(start), mixture.counts(start + count)
    assert sum(after) == start + count
    for i, weight in enumerate(weights):
        # The places of each source are taken in order and none is left out.
        assert place[source == i].tolist() == list(range(before[i], after[i]))
        assert abs((source == i).sum() - count * weight / sum(weights)) < 3


def test_proportions_are_exact_over_time():
    mixture = Mixture([0.7, 0.2, 0.1], [0])
    assert mixture.counts(10**12) == [7 * 10**11, 2 * 10**11, 10**11]
    source, _ = mixture(np.arange(10))
    assert np.bincount(source).tolist() == [7, 2, 1]


def test_the_seed_decides_which_row_is_whose():
    orders = {tuple(Mixture([0.7, 0.3], [seed])(np.arange(10))[0].tolist()) for seed in range(8)}
    assert len(orders) > 1


@pytest.mark.parametrize("wrong", [[1, 0], [1, -2], [1, float("nan")], [1, 1e-9]])
def test_weights_that_cannot_be_kept(wrong):
    with pytest.raises(UsageError, match="expected numbers above 0"):
        Mixture(wrong, [0])
