"""The held-out score during training: on a fixed part of the held-out data, the same at every evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Protocol

import numpy as np
import torch

from flash_gsa.data import NOT_SCORED, Batch, DocumentBatch, TokenStore, iter_whole_documents
from flash_gsa.evaluation.bits_per_byte import NOTHING, evaluate_documents
from flash_gsa.evaluation.mqar import count_right
from flash_gsa.training.engine import Engine

_TOKENS_A_PASS = 16_384


class HeldOut(Protocol):
    """Scores a model; the result becomes part of an `eval` line of metrics.jsonl."""

    def score(self, engine: Engine) -> dict[str, Any]:
        """Figures by name, of the engine's model; every process calls it and gets the same."""

    def sample(self, tokens: int) -> list[int]:
        """At most so many tokens of it, the same at every call."""


class HeldOutText:
    """Loss and bits per byte of whole documents, in the given order.

    With `max_bytes`, a document is left out if those before it and it have more bytes together; the shortest
    is scored in any case.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, max_bytes: int | None) -> None:
        self.store = store
        self.documents = documents if max_bytes is None else _that_fit(store, documents, max_bytes)

    def score(self, engine: Engine) -> dict[str, Any]:
        """`{"loss": nats a token, "bits_per_byte": …, "by_source": {source: bits per byte}}`."""
        own = self.documents[engine.rank :: engine.ranks]
        passes = sum(1 for _ in self._batches(own))
        # Where weights are in shards, a pass needs every process, and what a whole call gathers it gathers once: so
        # those with fewer passes make as many, in the same call.
        missing = max(engine.gather(passes)) - passes
        found = engine.score(evaluate_documents, chain(self._batches(own), repeat(self._nothing(), missing)))
        result = sum(engine.gather(found), NOTHING)
        return {
            "loss": result.total.nats / result.total.tokens,
            "bits_per_byte": result.total.bits_per_byte,
            "by_source": {name: score.bits_per_byte for name, score in sorted(result.by_source.items())},
        }

    def _batches(self, documents: np.ndarray) -> Iterator[DocumentBatch]:
        return iter_whole_documents(self.store, documents, _TOKENS_A_PASS)

    def _nothing(self) -> DocumentBatch:
        """A pass of one token that scores nothing: the end, as it were, of some document."""
        token, bounds = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
        labels, none = (self.store.label(int(self.documents[0])),), np.zeros(1, np.int64)
        unscored = torch.full_like(token, NOT_SCORED)
        return DocumentBatch(token, unscored, bounds, self.documents[:1], labels, none, continues=True)

    def sample(self, tokens: int) -> list[int]:
        """The beginning of the longest document."""
        longest = self.documents[self.store.lengths(self.documents).argmax()]
        return self.store.document(int(longest))[:tokens].tolist()


class HeldOutMQAR:
    """Accuracy over the queries of MQAR batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def score(self, engine: Engine) -> dict[str, Any]:
        """`{"accuracy": 0 … 1}`."""
        passes = -(-len(self._batches) // engine.ranks)
        own = self._batches[engine.rank :: engine.ranks]
        first = self._batches[0]
        nothing = replace(first, targets=torch.full_like(first.targets, NOT_SCORED))  # see HeldOutText
        right, scored = engine.score(count_right, [*own, *repeat(nothing, passes - len(own))])
        every = engine.gather((right, scored))
        return {"accuracy": sum(r for r, _ in every) / sum(n for _, n in every)}

    def sample(self, tokens: int) -> list[int]:
        """The beginning of the first row."""
        return self._batches[0].input_ids[0, :tokens].tolist()


def _that_fit(store: TokenStore, documents: np.ndarray, max_bytes: int) -> np.ndarray:
    left = max_bytes
    chosen = []
    sizes = store.sizes(documents)
    for document, size in zip(documents.tolist(), sizes.tolist(), strict=True):
        if size <= left:
            chosen.append(document)
            left -= size
    return np.array(chosen) if chosen else documents[[sizes.argmin()]]
