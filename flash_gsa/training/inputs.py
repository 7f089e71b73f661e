"""What a recipe's `data` section means: batches to train on, and held-out data to score."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from flash_gsa.data import (
    Batch,
    Document,
    MQARBatches,
    PackedBatches,
    Part,
    TokenStore,
    iter_documents,
    load_tokenizer,
    prepare_tokens,
    sample_documents,
    split_documents,
)
from flash_gsa.errors import UsageError
from flash_gsa.training.held_out import HeldOut, HeldOutMQAR, HeldOutText
from flash_gsa.training.recipe import MQARData, Recipe, TextData, WeightedSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int, int], None]


class Batches(Protocol):
    """An endless stream of batches with a position that can be saved.

    `position` counts the batches drawn; batch i has the same rows on every process.
    """

    position: int

    def __next__(self) -> Batch: ...
    def batch(self, index: int, rows: slice = ...) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads.

    Attributes:
        batches: what it is trained on.
        held_out: what it is scored on.
        vocab_size: token ids are below this.
        tokenizer: saved with every checkpoint; None for made-up tasks.
        bytes_per_token: UTF-8 bytes of training text a scored token stands for, where that is known.
    """

    batches: Batches
    held_out: HeldOut
    vocab_size: int
    tokenizer: "PreTrainedTokenizerFast | None" = None
    bytes_per_token: float | None = None

    def told(self, steps: int | None) -> tuple[str, ...]:
        """A line for each source: documents, tokens, and how often `steps` steps go through them; none for MQAR."""
        if not isinstance(self.batches, PackedBatches):
            return ()
        epochs = [None] * len(self.batches.parts) if steps is None else self.batches.epochs_after(steps)
        lines = []
        for i, (part, tokens) in enumerate(zip(self.batches.parts, self.batches.part_tokens, strict=True)):
            count = part.store.num_documents if part.documents is None else len(part.documents)
            named = f"source {i + 1}: " if len(epochs) > 1 else ""
            often = "" if epochs[i] is None else f", gone through {epochs[i]:.2f} times in all"
            lines.append(f"{named}{count:,} document{'s'[: count - 1]} of {tokens:,} tokens to train on{often}")
        return tuple(lines)

    def describe(self, batch: Batch) -> str:
        """The first words of some sequences of a batch, for a message about it."""
        if self.tokenizer is None or batch.cu_seqlens is None:
            return f"row 0 begins {batch.input_ids[0, :8].tolist()}"
        starts = batch.cu_seqlens[:3].tolist()
        texts = [self.tokenizer.decode(batch.input_ids[0, s : s + 24]) for s in starts]
        return "with sequences that begin " + ", ".join(map(repr, texts))


@dataclass(frozen=True)
class TextParts:
    """What a text recipe trains on, one part a source of `TextData.weighted_sources`, and what it holds out.

    `held_out` are indices into `held_out_store`.
    """

    train: list[Part]
    held_out_store: TokenStore
    held_out: np.ndarray


def prepare_inputs(
    recipe: Recipe,
    *,
    saved_tokenizer: Path | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> Inputs:
    """Reads and tokenises what the recipe names (or finds it in the cache).

    Args:
        saved_tokenizer: a checkpoint of this run, whose tokenizer is taken instead of being made again.
        progress: called with (documents, bytes) done while tokenising.
        verifying: called with (bytes read, bytes to read) while comparing the checksums of tokens.

    Raises:
        UsageError: the data or the tokenizer cannot be used.
    """
    if isinstance(recipe.data, MQARData):
        return _mqar(recipe, recipe.data)
    if saved_tokenizer is not None:
        tokenizer = load_tokenizer(str(saved_tokenizer))
    else:
        tokenizer = recipe_tokenizer(recipe)
    parts = text_parts(recipe, tokenizer, progress=progress, verifying=verifying)
    batches = PackedBatches(parts.train, length=recipe.batch.length, rows=recipe.batch.rows, seed=recipe.seed)
    return Inputs(
        batches,
        HeldOutText(parts.held_out_store, parts.held_out, recipe.evaluation.max_bytes),
        len(tokenizer),
        tokenizer,
        _bytes_per_token(parts.train),
    )


def recipe_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """The tokenizer a text recipe names; `bpe:N` is trained on the recipe's training documents only."""
    assert recipe.tokenizer is not None

    def training_texts() -> Iterator[str]:
        # Which documents are held out does not depend on the tokenizer, and bytes need no training.
        parts = text_parts(recipe, load_tokenizer("byte"))
        return (document.text for document in part_documents(recipe, parts, "train"))

    return load_tokenizer(recipe.tokenizer, training_texts=training_texts)


def text_parts(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> TextParts:
    """Tokenises the sources of a text recipe and divides them by document.

    The division depends on the texts, `data` and nothing else: not on the tokenizer, not on `seed`.

    Raises:
        UsageError: the sources cannot be used.
    """
    data = recipe.data
    assert isinstance(data, TextData)
    stores, train, held_out = [], [], []
    first = 0
    for entry, share in _shares(data):
        store = _store(entry.source, data, tokenizer, _limit(data.max_bytes, share), progress, verifying)
        if entry.name is not None:
            store = store.labelled(entry.name)
        sizes: dict[str, int | float] = {}  # by the key of the recipe, which a refusal names
        if data.held_out is not None:
            sizes["data.held_out"] = data.held_out if data.held_out < 1 else _part_of(int(data.held_out), share)
        used = _limit(data.train_bytes, share)
        try:
            division = split_documents(store, sizes) if sizes else {}
        except UsageError as error:
            if share == 1:
                raise
            divided = "" if (data.held_out or 0) < 1 else " (a number of bytes is divided between sources by weight)"
            raise UsageError(f"The source {entry.source}{divided}: {error}") from None
        documents = division.get("train")  # None: all
        available = store.num_bytes if documents is None else int(store.sizes(documents).sum())
        if used is not None and used < available:
            documents = sample_documents(store, documents, used)
        train.append(Part(store, documents, entry.weight))
        stores.append(store)
        held_out.append(first + division.get("data.held_out", np.array([], np.int64)))
        first += store.num_documents
    if data.valid_source is not None:
        held_out_store = _store(data.valid_source, data, tokenizer, None, progress, verifying)
        return TextParts(train, held_out_store, np.arange(held_out_store.num_documents))
    return TextParts(train, TokenStore.joined(stores), np.concatenate(held_out))


def part_documents(recipe: Recipe, parts: TextParts, part: Literal["train", "held_out"]) -> Iterator[Document]:
    """The documents themselves of one part, source by source, in the order of their indices."""
    data = recipe.data
    assert isinstance(data, TextData)
    if part == "held_out" and data.valid_source is not None:
        yield from _chosen(data, data.valid_source, parts.held_out, len(parts.held_out))
        return
    first = 0
    for (entry, _), trained in zip(_shares(data), parts.train, strict=True):
        end = first + trained.store.num_documents
        if part == "train":
            wanted = trained.documents
        else:
            wanted = parts.held_out[(parts.held_out >= first) & (parts.held_out < end)] - first
        for document in _chosen(data, entry.source, wanted, trained.store.num_documents):
            yield document if entry.name is None else document._replace(source=entry.name)
        first = end


def cache_folder(data: TextData) -> Path:
    """Where tokens are cached: `data.cache_dir`, or flash-gsa's folder in the user's cache."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash-gsa" / "tokens"


def _shares(data: TextData) -> list[tuple[WeightedSource, Fraction]]:
    """Every source with its part of the rows."""
    total = sum(Fraction(entry.weight) for entry in data.weighted_sources)
    return [(entry, Fraction(entry.weight) / total) for entry in data.weighted_sources]


def _limit(size: int | None, share: Fraction) -> int | None:
    return None if size is None else _part_of(size, share)


def _part_of(size: int, share: Fraction) -> int:
    return max(1, round(size * share))


def _chosen(data: TextData, source: str | list[str], documents: np.ndarray | None, count: int) -> Iterator[Document]:
    """The documents with these indices (ascending; None: the first `count`)."""
    wanted = iter(range(count) if documents is None else documents.tolist())
    following = next(wanted, None)
    found = iter_documents(source, text_field=data.text_field, source_field=data.source_field)
    for index, document in enumerate(found):
        if following is None:
            return
        if index == following:
            yield document
            following = next(wanted, None)


def _bytes_per_token(train: list[Part]) -> float:
    """UTF-8 bytes a scored token, over rows that hold the parts by weight. Of a document all tokens but the last are
    scored."""
    size = scored = 0.0
    for part in train:
        store, documents = part.store, part.documents
        if documents is None:
            tokens, texts, num_bytes = store.num_tokens, store.num_documents, store.num_bytes
        else:
            tokens, texts = int(store.lengths(documents).sum()), len(documents)
            num_bytes = int(store.sizes(documents).sum())
        size += part.weight * num_bytes / tokens
        scored += part.weight * (tokens - texts) / tokens
    return size / scored


def _store(
    source: str | list[str],
    data: TextData,
    tokenizer: "PreTrainedTokenizerFast",
    max_bytes: int | None,
    progress: Progress | None,
    verifying: Progress | None,
) -> TokenStore:
    return prepare_tokens(
        source,
        tokenizer,
        cache_dir=cache_folder(data),
        text_field=data.text_field,
        source_field=data.source_field,
        max_bytes=max_bytes,
        verify=data.verify,
        progress=progress,
        verifying=verifying,
    )


def _mqar(recipe: Recipe, data: MQARData) -> Inputs:
    def batches(held_out: bool) -> MQARBatches:
        return MQARBatches(
            recipe.batch.rows,
            recipe.batch.length,
            data.num_kv_pairs,
            data.vocab_size,
            data.power_a,
            data.random_non_queries,
            seed=recipe.seed,
            held_out=held_out,
        )

    scored = batches(held_out=True)
    count = -(-data.held_out // recipe.batch.rows)
    return Inputs(batches(held_out=False), HeldOutMQAR([next(scored) for _ in range(count)]), data.vocab_size)
