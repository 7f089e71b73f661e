"""Evaluation batches: whole documents, each token predicted once, from everything before it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from flash_gsa.data.batches import NOT_SCORED, Batch
from flash_gsa.data.store import TokenStore
from flash_gsa.errors import UsageError


@dataclass(frozen=True)
class DocumentBatch(Batch):
    """A packed batch of whole documents, or one piece of a long document.

    Attributes:
        documents: `[S]` int64, the store's index of the document in each sequence.
        labels: the S source labels.
        num_bytes: `[S]` int64, UTF-8 bytes of the document; 0 in every piece after its first, so that sums are
            right.
        continues: the only sequence goes on where that of the previous batch stopped: the model's state must be
            carried over.
    """

    documents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: tuple[str, ...] = ()
    num_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    continues: bool = False


def iter_whole_documents(store: TokenStore, documents: np.ndarray, max_tokens: int) -> Iterator[DocumentBatch]:
    """`documents` in the order given, as many a batch as fit in `max_tokens`.

    A document longer than that comes alone, in pieces of `max_tokens` in a row; the last target of a piece is the
    first token of the next. So of every document all tokens but the first are targets exactly once.

    Raises:
        UsageError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, expected a whole number of at least 1")
    documents = np.asarray(documents, np.int64)
    return _batches(store, documents, store.lengths(documents), max_tokens)


def _batches(store: TokenStore, documents: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[DocumentBatch]:
    first = tokens = 0
    for at, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > max_tokens:
            yield _group(store, documents[first:at])
            first, tokens = at, 0
        if length > max_tokens:
            yield from _pieces(store, int(documents[at]), max_tokens)
            first = at + 1
        else:
            tokens += length
    if tokens:
        yield _group(store, documents[first:])


def _group(store: TokenStore, documents: np.ndarray) -> DocumentBatch:
    texts = [store.document(index) for index in documents]
    ids = np.concatenate(texts).astype(np.int64)
    ends = np.cumsum([len(text) for text in texts])
    targets = np.append(ids[1:], NOT_SCORED)
    targets[ends - 1] = NOT_SCORED
    return _batch(store, ids, targets, np.append(0, ends), documents)


def _pieces(store: TokenStore, document: int, max_tokens: int) -> Iterator[DocumentBatch]:
    text = store.document(document)
    for start in range(0, len(text), max_tokens):
        ids = text[start : start + max_tokens].astype(np.int64)
        targets = text[start + 1 : start + 1 + max_tokens].astype(np.int64)
        if len(targets) < len(ids):
            targets = np.append(targets, NOT_SCORED)
        ends = np.array([0, len(ids)])
        yield _batch(store, ids, targets, ends, np.array([document]), continues=start > 0)


def _batch(
    store: TokenStore,
    ids: np.ndarray,
    targets: np.ndarray,
    boundaries: np.ndarray,
    documents: np.ndarray,
    continues: bool = False,
) -> DocumentBatch:
    return DocumentBatch(
        torch.from_numpy(ids[None]),
        torch.from_numpy(targets[None]),
        torch.from_numpy(boundaries.astype(np.int32)),
        documents,
        tuple(store.label(index) for index in documents),
        np.zeros(1, np.int64) if continues else store.sizes(documents),
        continues,
    )
