"""How well a language model predicts documents: perplexity a token and bits a byte, exactly.

A document `[bos] y_1 … y_n [eos]` costs  nats = −Σ_t ln P(y_t | bos, y_<t)  over its n tokens and the eos.
Every token is scored with the whole document before it, however long.

    perplexity    = exp(Σ nats / Σ scored tokens)
    bits per byte = Σ nats / (ln 2 · Σ bytes of UTF-8 text)

Bits per byte can be compared between tokenizers, perplexities cannot.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from flash_gsa.data import NOT_SCORED, DocumentBatch
from flash_gsa.errors import UsageError
from flash_gsa.models.loss import token_losses


@dataclass(frozen=True)
class Score:
    """What some documents cost a model: nats over `tokens` scored tokens, which stand for `bytes` of text."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )

    @property
    def perplexity(self) -> float:
        """Per token; inf where it exceeds the range of floating point numbers."""
        nats = self.nats / max(1, self.tokens)
        return math.exp(nats) if nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text; nan if there is no byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def as_dict(self) -> dict[str, float | int]:
        """The fields and both measures, for JSON."""
        return {**vars(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class Evaluation:
    """The score of all documents, and of those of each source."""

    total: Score
    by_source: dict[str, Score]

    def __add__(self, other: "Evaluation") -> "Evaluation":
        names = self.by_source.keys() | other.by_source.keys()
        none = Score()
        by_source = {n: self.by_source.get(n, none) + other.by_source.get(n, none) for n in names}
        return Evaluation(self.total + other.total, by_source)


NOTHING = Evaluation(Score(), {})


@torch.no_grad()
def evaluate_documents(
    model: Any,
    batches: Iterable[DocumentBatch],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Evaluation:
    """Score documents with a language model.

    Documents of one batch do not see each other (`cu_seqlens`); a document that comes in pieces is run with the
    recurrent state carried from piece to piece, which is the same computation as one pass.

    Args:
        model: a `GSAForCausalLM`, on the device it shall run on; scored in evaluation mode.
        batches: from `iter_whole_documents`; their size decides memory, not the result.
        autocast: makes the context of each pass, for instance `Engine.autocast` for bf16 products.

    Raises:
        UsageError: there is no document.
    """
    by_source: dict[str, Score] = defaultdict(Score)
    was_training = model.training
    model.eval()
    try:
        cache = None
        for batch in batches:
            with autocast():
                losses, cache = _losses(model, batch, cache if batch.continues else None)
            for label, score in _scores(batch, losses):
                by_source[label] += score
    finally:
        model.train(was_training)
    if not by_source:
        raise UsageError("there is no document to evaluate; give a source that holds text")
    return Evaluation(sum(by_source.values(), Score()), dict(by_source))


def _losses(model: Any, batch: DocumentBatch, cache: Any) -> tuple[torch.Tensor, Any]:
    """Nats of each position [T], 0 where nothing is scored; and the cache, if the document may go on."""
    on_device = batch.to(model.lm_head.weight.device)
    alone = len(batch.documents) == 1
    output = model.model(
        on_device.input_ids,
        cu_seqlens=None if alone else batch.cu_seqlens,
        past_key_values=cache,
        use_cache=alone,
    )
    losses = token_losses(output.last_hidden_state, model.lm_head.weight, on_device.targets)
    return losses[0].double().cpu(), output.past_key_values


def _scores(batch: DocumentBatch, losses: torch.Tensor) -> Iterable[tuple[str, Score]]:
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff().tolist()
    scored = batch.targets[0] != NOT_SCORED
    parts = zip(losses.split(lengths), scored.split(lengths), strict=True)
    for i, (nats, counted) in enumerate(parts):
        size, documents = int(batch.num_bytes[i]), 0 if batch.continues else 1
        yield batch.labels[i], Score(float(nats.sum()), int(counted.sum()), size, documents)
