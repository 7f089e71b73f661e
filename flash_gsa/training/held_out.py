"""The held-out score during training: on a fixed part of the held-out data, the same at every evaluation."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from flash_gsa.data import Batch, TokenStore, iter_whole_documents
from flash_gsa.evaluation.bits_per_byte import evaluate_documents
from flash_gsa.evaluation.mqar import mqar_accuracy
from flash_gsa.training.engine import Engine

_TOKENS_A_PASS = 16_384


class HeldOut(Protocol):
    """Scores a model; the result becomes part of an `eval` line of metrics.jsonl."""

    def score(self, model: nn.Module, engine: Engine) -> dict[str, Any]:
        """Figures by name."""

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

    def score(self, model: nn.Module, engine: Engine) -> dict[str, Any]:
        """`{"loss": nats a token, "bits_per_byte": …, "by_source": {source: bits per byte}}`."""
        batches = iter_whole_documents(self.store, self.documents, _TOKENS_A_PASS)
        result = evaluate_documents(model, batches, autocast=engine.autocast)
        return {
            "loss": result.total.nats / result.total.tokens,
            "bits_per_byte": result.total.bits_per_byte,
            "by_source": {name: score.bits_per_byte for name, score in sorted(result.by_source.items())},
        }

    def sample(self, tokens: int) -> list[int]:
        """The beginning of the longest document."""
        longest = self.documents[self.store.lengths(self.documents).argmax()]
        return self.store.document(int(longest))[:tokens].tolist()


class HeldOutMQAR:
    """Accuracy over the queries of MQAR batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def score(self, model: nn.Module, engine: Engine) -> dict[str, Any]:
        """`{"accuracy": 0 … 1}`."""
        return {"accuracy": mqar_accuracy(model, self._batches, autocast=engine.autocast)}

    def sample(self, tokens: int) -> list[int]:
        """The beginning of the first row."""
        return self._batches[0].input_ids[0, :tokens].tolist()


def _that_fit(store: TokenStore, documents: np.ndarray, max_bytes: int) -> np.ndarray:
    left = max_bytes
    chosen = []
    for document in documents:
        if store.num_bytes[document] <= left:
            chosen.append(document)
            left -= int(store.num_bytes[document])
    return np.array(chosen) if chosen else documents[[store.num_bytes[documents].argmin()]]
