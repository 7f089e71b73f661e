"""Byte n-gram language models, the yardstick for small language models.

Interpolated modified Kneser–Ney smoothing. For a context h of k bytes, h' being h without its first byte:

    P_k(w | h) = ( c(hw) − D(c(hw)) ) / Σ_w' c(hw')  +  γ(h) · P_{k−1}(w | h')
    γ(h)       = Σ_w' D(c(hw')) / Σ_w' c(hw')
    D(0) = 0,  D(1), D(2), D(3 and more): three discounts an order, from how many n-grams occur 1, 2, 3, 4 times

At the model's own order c is the number of occurrences; at the lower orders it backs off to, it is the
number of *different* bytes seen before the n-gram. Below order 0 lies the uniform distribution; a context
that was never seen uses P_{k−1} alone.

Source: S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
Harvard TR-10-98, 1998 (section 3). Where the discounts are undefined (too few n-grams, as at order 0),
0.5, 1 and 1.5 are used.

A document is scored as a language model scores it: its bytes, then an end symbol, all predicted; the
context of its first byte is k start symbols. So the alphabet has 257 symbols.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOUNDARY = 256
"""The symbol before and after every document."""

ALPHABET = 257

# An n-gram of up to seven symbols is one unsigned 64-bit number, nine bits a symbol, oldest first, so that
# counting is sorting, a context is a shift, and an n-gram's suffix a mask.
_BITS = np.uint64(9)
_MAX_ORDER = 6

_Keys = npt.NDArray[np.uint64]
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Level:
    """What one order needs to answer queries: P = (c − D(c)) / total + (γ / total) · lower."""

    grams: _Keys  # sorted, [n]
    discounted: npt.NDArray[np.float64]  # c − D(c), [n]
    contexts: _Keys  # sorted, [m]
    total: npt.NDArray[np.float64]  # Σ c, [m]
    freed: npt.NDArray[np.float64]  # Σ D(c), [m]

    @classmethod
    def count(cls, grams: _Keys, counts: _Counts) -> "_Level":
        discount = _discounts(counts)[np.minimum(counts, 3)]
        contexts, start = np.unique(grams >> _BITS, return_index=True)
        return cls(
            grams=grams,
            discounted=counts - discount,
            contexts=contexts,
            total=np.add.reduceat(counts, start).astype(np.float64),
            freed=np.add.reduceat(discount, start),
        )

    def interpolate(self, queries: _Keys, lower: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        seen, at = _find(self.contexts, queries >> _BITS)
        total = np.where(seen, self.total[at], 1.0)
        freed = np.where(seen, self.freed[at], 1.0)
        known, at = _find(self.grams, queries)
        return (np.where(known, self.discounted[at], 0.0) + freed * lower) / total


class ByteNGrams:
    """Byte n-gram models of orders 0 … `max_order`, counted in one pass; order k sees k bytes of context.

    Fitting takes about 0.1 s and 30 MB for each MB of text.

    Args:
        documents: the texts to count, as bytes.
        max_order: largest context length in bytes, 0 to 6.

    Raises:
        ValueError: `max_order` out of range, or no document.
    """

    def __init__(self, documents: Iterable[bytes], max_order: int = 5) -> None:
        if not 0 <= max_order <= _MAX_ORDER:
            raise ValueError(f"max_order is {max_order}; expected 0 to {_MAX_ORDER} bytes of context")
        self.max_order = max_order
        keys = _ngrams(documents, max_order)
        if not len(keys):
            raise ValueError("no document to count; expected at least one")
        grams, counts = np.unique(keys, return_counts=True)
        own, lower = [_Level.count(grams, counts)], []
        for order in range(max_order - 1, -1, -1):
            grams, counts, preceded = _shorten(grams, counts, order)
            own.append(_Level.count(grams, counts))
            lower.append(_Level.count(grams, preceded))
        self._own, self._lower = own[::-1], lower[::-1]

    def probabilities(self, context: bytes, order: int) -> npt.NDArray[np.float64]:
        """P(next symbol | context), [257]; index 256 is the end of the document.

        A context shorter than `order` is taken to be all of the document so far.
        """
        symbols = ([BOUNDARY] * order + list(context))[len(context) :]
        head = np.uint64(0)
        for symbol in symbols:
            head = (head << _BITS) | np.uint64(symbol)
        return self._score((head << _BITS) | np.arange(ALPHABET, dtype=np.uint64), order)[order]

    def bits_per_byte(self, documents: Iterable[bytes]) -> list[float]:
        """Bits a byte of `documents` under each order, `[order 0, order 1, …]`, ends of documents included.

        Raises:
            ValueError: the documents hold no bytes.
        """
        documents = list(documents)
        total = sum(map(len, documents))
        if not total:
            raise ValueError("no bytes to score; expected at least one")
        queries, times = np.unique(_ngrams(documents, self.max_order), return_counts=True)
        return [float(-(times @ np.log2(p))) / total for p in self._score(queries, self.max_order)]

    def _score(self, queries: _Keys, order: int) -> list[npt.NDArray[np.float64]]:
        """Probabilities of n-grams of order+1 symbols under each of the models 0 … order."""
        lower = np.full(len(queries), 1.0 / ALPHABET)
        scores = []
        for k in range(order + 1):
            suffix = queries & _mask(k + 1)
            scores.append(self._own[k].interpolate(suffix, lower))
            if k < order:
                lower = self._lower[k].interpolate(suffix, lower)
        return scores


def _ngrams(documents: Iterable[bytes], order: int) -> _Keys:
    """Every (order+1)-gram of the documents, each ending at a byte or at the end symbol."""
    pad = np.full(order, BOUNDARY, np.uint64)
    parts = [np.empty(0, np.uint64)]
    for text in documents:
        symbols = np.concatenate([pad, np.frombuffer(text, np.uint8), [np.uint64(BOUNDARY)]], dtype=np.uint64)
        keys = np.zeros(len(text) + 1, np.uint64)
        for offset in range(order + 1):
            keys = (keys << _BITS) | symbols[offset : offset + len(keys)]
        parts.append(keys)
    return np.concatenate(parts)


def _shorten(grams: _Keys, counts: _Counts, order: int) -> tuple[_Keys, _Counts, _Counts]:
    """Counts of the (order+1)-grams from those one symbol longer: grams, occurrences, different predecessors.

    N-grams at the start of a document all follow the start symbol; as usual, they keep their occurrences.
    """
    suffix = grams & _mask(order + 1)
    by_suffix = np.argsort(suffix, kind="stable")
    shorter, start = np.unique(suffix[by_suffix], return_index=True)
    occurrences = np.add.reduceat(counts[by_suffix], start)
    preceded = np.diff(np.append(start, len(suffix)))
    at_start = (shorter >> (_BITS * np.uint64(order)) == BOUNDARY) & (order > 0)
    return shorter, occurrences, np.where(at_start, occurrences, preceded)


def _discounts(counts: _Counts) -> npt.NDArray[np.float64]:
    """D(0), D(1), D(2), D(≥3) by Chen and Goodman's estimate: j − (j+1)·Y·n_{j+1}/n_j, Y = n₁/(n₁+2n₂)."""
    n1, n2, n3, n4 = (int((counts == j).sum()) for j in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (discounts[1:] > 0).all():
            return discounts
    return np.array([0.0, 0.5, 1.0, 1.5])


def _find(table: _Keys, queries: _Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Whether each query is in the sorted table, and where."""
    at = np.minimum(np.searchsorted(table, queries), len(table) - 1)
    return table[at] == queries, at


def _mask(symbols: int) -> np.uint64:
    return np.uint64((1 << (9 * symbols)) - 1)
