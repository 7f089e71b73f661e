"""Which documents are for training and which are held out."""

from collections.abc import Mapping

import numpy as np

from flash_gsa.data.order import mix
from flash_gsa.data.store import TokenStore
from flash_gsa.errors import UsageError


def split_documents(store: TokenStore, held_out: Mapping[str, float | int], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Document indices of "train" and of every held-out part, each in ascending order (int64).

    Documents are ranked by a hash of their text and the seed. In that order each part of `held_out` takes
    documents until they hold as many UTF-8 bytes as it asks for, at least one; "train" is the rest. So
    the split is the same for every tokenizer, equal texts are never on two sides, and documents added later
    do not change the rank of those that were there.

    Args:
        store: the documents.
        held_out: part → how much: a float below 1 is a share of all bytes, an int a number of bytes. For instance
            `{"valid": 0.01, "test": 200_000}`.
        seed: another one draws another split.

    Raises:
        UsageError: a part's name or size is no good, or nothing is left to train on.
    """
    total = store.num_bytes
    order, rank = _ranked(store, seed)
    covered = np.cumsum(store.sizes()[order])
    parts: dict[str, np.ndarray] = {}
    start = 0
    for name, size in held_out.items():
        if name == "train":
            raise UsageError(
                "held_out names 'train', which is what the other parts leave. Expected for instance 'valid'"
            )
        if isinstance(size, bool) or not (0 < size < 1 or (isinstance(size, int) and size >= 1)):
            raise UsageError(
                f"held_out part {name!r} is {size!r}, expected a share between 0 and 1 or a whole number of bytes"
            )
        wanted = (covered[start - 1] if start else 0) + (size if isinstance(size, int) else size * total)
        end = _end(covered, rank, wanted)
        if end >= len(rank):
            raise UsageError(
                f"{', '.join(f'{name}={size}' for name, size in held_out.items())} leaves no document to train on: "
                f"there are {len(rank)} documents of {total:,} bytes. Hold out less, or name a separate source for it"
            )
        parts[name] = np.sort(order[start:end])
        start = end
    return {"train": np.sort(order[start:]), **parts}


def sample_documents(store: TokenStore, documents: np.ndarray | None, size: int, *, seed: int = 0) -> np.ndarray:
    """Of `documents` (indices; None: all) the first by the same ranks that hold `size` UTF-8 bytes, in ascending order.

    All, if they hold fewer. A larger `size` keeps what a smaller one chose.

    Args:
        store: the documents.
        documents: int64 indices to choose among, for instance the "train" of `split_documents` with the same `seed`.
        size: bytes; the document with which they are reached is the last, with all that have its text.
        seed: another one draws another sample.

    Returns:
        int64 indices; empty if `documents` is.
    """
    order, rank = _ranked(store, seed)
    if documents is not None:
        among = np.isin(order, documents)
        order, rank = order[among], rank[among]
    if not len(order):
        return order
    return np.sort(order[: _end(np.cumsum(store.sizes()[order]), rank, size)])


def _ranked(store: TokenStore, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All documents' indices in the order of their ranks, and those."""
    rank = mix(store.digests() ^ mix(np.array([seed], np.int64).astype(np.uint64)))
    order = np.argsort(rank, kind="stable")
    return order, rank[order]


def _end(covered: np.ndarray, rank: np.ndarray, wanted: float) -> int:
    """How many documents it takes to cover `wanted` bytes. Equal texts have equal ranks: behind the last of them."""
    end = int(np.searchsorted(covered, wanted)) + 1
    return int(np.searchsorted(rank, rank[min(end, len(rank)) - 1], side="right"))
