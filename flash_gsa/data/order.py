"""Orders that are computed, not stored: permutations of any size in constant memory, and mixtures by weight.

Both answer "what stands at place i" at once, for any i, so that nothing has to be replayed to go on from there.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from flash_gsa.errors import UsageError

_ROUNDS = 6
# Shares are fractions with denominators up to this: places up to 2⁴³ can be multiplied in 64 bits.
_FINEST_SHARE = 1 << 20
_SMALLEST_SHARE = 1e-5


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 in which every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A permutation of 0 … size − 1 that looks random, drawn from `seed`; `permutation(places)` applies it.

    A Feistel network permutes the numbers of 2h bits, the smallest 4ʰ ≥ size: with halves (l, r),

        (l, r) ← (r, l ⊕ F_i(r))        for six keyed functions F_i

    can be undone whatever F_i is, so it is one to one. Where the result is not below `size` it is put in again, until
    it is: that walks along a cycle of the network, so the whole stays one to one.

    Args:
        size: at least 1.
        seed: whole numbers of at least 0.
    """

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        assert size >= 1
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Where each of `places` (int64, below `size`) goes, int64."""
        numbers = self._network(places.astype(np.uint64))
        outside = np.flatnonzero(numbers >= self.size)
        while len(outside):
            numbers[outside] = self._network(numbers[outside])
            outside = outside[numbers[outside] >= self.size]
        return numbers.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right ^ key) & self._mask)
        return (left << self._half) | right


class Mixture:
    """Deals places 0, 1, 2, … to sources in proportion to their weights.

    The first source takes every place m at which m·w₁/(w₁ + w₂ + …) + φ passes a whole number, with a phase
    0 ≤ φ < 1 drawn from the seed; what it leaves is dealt to the others in the same way. So any stretch of places, not
    only a long one, holds the sources in their proportions to within a few places. How many of the first m places are
    of a source has a formula, and that number is the place within the source.

    Args:
        weights: one a source, above 0; only their proportions count (to six digits).
        seed: whole numbers of at least 0.

    Raises:
        UsageError: a weight is not above 0, or a source's share is below 0.00001.
    """

    def __init__(self, weights: Sequence[float], seed: Sequence[int]) -> None:
        total = sum(weights)
        for weight in weights:
            if not weight > 0 or weight / total < _SMALLEST_SHARE:
                raise UsageError(
                    f"the weights of the sources are {', '.join(map(str, weights))}: expected numbers above 0, each "
                    f"at least {_SMALLEST_SHARE:.5f} of their sum. Correct {weight}, or leave that source out"
                )
        exact = [Fraction(weight) for weight in weights]
        shares = [(w / sum(exact[i:])).limit_denominator(_FINEST_SHARE) for i, w in enumerate(exact[:-1])]
        phases = np.random.SeedSequence(seed).generate_state(len(shares), np.uint64).tolist()
        self._dealt = [
            (share.numerator, share.denominator, phase % share.denominator)
            for share, phase in zip(shares, phases, strict=True)
        ]

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, place among those of that source) of each of `places`; all int64."""
        place = places.astype(np.int64)
        source = np.full(len(place), len(self._dealt))
        left = np.arange(len(place))
        for i, (p, q, phase) in enumerate(self._dealt):
            before = (place[left] * p + phase) // q
            takes = (place[left] + 1) * p + phase >= (before + 1) * q
            place[left] = np.where(takes, before, place[left] - before)
            source[left[takes]] = i
            left = left[~takes]
        return source, place

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` places are of each source."""
        counts = []
        for p, q, phase in self._dealt:
            counts.append((places * p + phase) // q)
            places -= counts[-1]
        return [*counts, places]
