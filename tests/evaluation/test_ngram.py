"""Byte n-gram models: proper distributions, equal to the formula followed literally."""

import math
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from flash_gsa.evaluation import ByteNGrams
from flash_gsa.evaluation.ngram import ALPHABET, BOUNDARY

TEXTS = [b"abracadabra", b"abba", b"", b"a cab, a dab, a bar\n", bytes(range(256)), b"\xff\x00\xff\x00"]


def literal_probability(documents: list[bytes], order: int, context: bytes, symbol: int) -> float:
    """Interpolated modified Kneser-Ney by the book, with dictionaries."""
    padded = [[BOUNDARY] * order + list(text) + [BOUNDARY] for text in documents]

    def occurrences(k: int) -> Counter:
        return Counter(tuple(s[i - k : i + 1]) for s in padded for i in range(order, len(s)))

    def counts(k: int) -> Counter:
        if k == order:
            return occurrences(k)
        preceded = Counter(gram[1:] for gram in occurrences(k + 1))
        starts = {g: c for g, c in occurrences(k).items() if k and g[0] == BOUNDARY}
        return Counter({**preceded, **starts})

    def probability(k: int, history: tuple[int, ...]) -> float:
        if k < 0:
            return 1 / ALPHABET
        table = counts(k)
        n = Counter(table.values())
        discount = [0.0, 0.5, 1.0, 1.5]
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            estimate = [0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))]
            discount = estimate if min(estimate[1:]) > 0 else discount
        followers = {g[-1]: c for g, c in table.items() if g[:-1] == history}
        lower = probability(k - 1, history[1:])
        if not followers:
            return lower
        total = sum(followers.values())
        gamma = sum(discount[min(c, 3)] for c in followers.values()) / total
        c = followers.get(symbol, 0)
        return (c - discount[min(c, 3)]) / total + gamma * lower

    history = ([BOUNDARY] * order + list(context))[len(context) :] if order else []
    return probability(order, tuple(history))


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_equals_the_formula_followed_literally(order):
    model = ByteNGrams(TEXTS, max_order=4)
    for context in (b"", b"a", b"ab", b"dabr", b"zzzz", b"\xff\x00\xff\x00"):
        got = model.probabilities(context, order)
        for symbol in (ord("a"), ord("c"), ord("~"), BOUNDARY):
            assert got[symbol] == pytest.approx(literal_probability(TEXTS, order, context, symbol), rel=1e-12)


def test_probabilities_sum_to_one_after_any_context():
    rng = random.Random(0)
    documents = [bytes(rng.choices(b"abcdef \n", k=200)) for _ in range(20)]
    model = ByteNGrams(documents)
    for _ in range(50):
        order = rng.randrange(6)
        context = bytes(rng.choices(b"abcdefg\n\xff", k=rng.randrange(8)))
        p = model.probabilities(context, order)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_bits_per_byte_sums_the_same_probabilities():
    model, held_out = ByteNGrams(TEXTS, max_order=3), [b"a barb", b"cab"]
    for order, bits in enumerate(model.bits_per_byte(held_out)):
        expected = 0.0
        for text in held_out:
            for i, symbol in enumerate([*text, BOUNDARY]):
                expected -= math.log2(model.probabilities(text[:i], order)[symbol])
        assert bits == pytest.approx(expected / 9, rel=1e-12)


def test_an_order_does_not_depend_on_how_many_are_fitted():
    small, large = ByteNGrams(TEXTS, max_order=2), ByteNGrams(TEXTS, max_order=5)
    np.testing.assert_allclose(small.bits_per_byte([b"abcab"]), large.bits_per_byte([b"abcab"])[:3], rtol=1e-12)


def test_longer_contexts_help_on_regular_text():
    sentence = b"the quick brown fox jumps over the lazy dog. "
    bits = ByteNGrams([sentence * 20]).bits_per_byte([sentence * 2])
    assert all(longer < shorter for shorter, longer in pairwise(bits))


@pytest.mark.parametrize("order", [-1, 7])
def test_refuses_orders_it_cannot_count(order):
    with pytest.raises(ValueError, match=f"max_order is {order}"):
        ByteNGrams(TEXTS, max_order=order)


def test_refuses_nothing():
    with pytest.raises(ValueError, match="no document"):
        ByteNGrams([])
    with pytest.raises(ValueError, match="no bytes"):
        ByteNGrams(TEXTS).bits_per_byte([b""])
