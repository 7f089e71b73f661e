"""What a recipe's `data` section means: batches to train on, and held-out data to score."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from flash_gsa.data import (
    Batch,
    Document,
    MQARBatches,
    PackedBatches,
    TokenStore,
    iter_documents,
    load_tokenizer,
    prepare_tokens,
    split_documents,
)
from flash_gsa.training.held_out import HeldOut, HeldOutMQAR, HeldOutText
from flash_gsa.training.recipe import MQARData, Recipe, TextData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int, int], None]


class Batches(Protocol):
    """An endless stream of batches with a position that can be saved."""

    def __next__(self) -> Batch: ...
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

    def describe(self, batch: Batch) -> str:
        """The first words of some sequences of a batch, for a message about it."""
        if self.tokenizer is None or batch.cu_seqlens is None:
            return f"row 0 begins {batch.input_ids[0, :8].tolist()}"
        starts = batch.cu_seqlens[:3].tolist()
        texts = [self.tokenizer.decode(batch.input_ids[0, s : s + 24]) for s in starts]
        return "with sequences that begin " + ", ".join(map(repr, texts))


@dataclass(frozen=True)
class TextParts:
    """The documents a text recipe trains on and holds out, as indices into token stores."""

    store: TokenStore
    train: np.ndarray
    held_out_store: TokenStore
    held_out: np.ndarray


def prepare_inputs(recipe: Recipe, *, saved_tokenizer: Path | None = None, progress: Progress | None = None) -> Inputs:
    """Reads and tokenises what the recipe names (or finds it in the cache).

    Args:
        saved_tokenizer: a checkpoint of this run, whose tokenizer is taken instead of being made again.
        progress: called with (documents, bytes) done while tokenising.

    Raises:
        UsageError: the data or the tokenizer cannot be used.
    """
    if isinstance(recipe.data, MQARData):
        return _mqar(recipe, recipe.data)
    if saved_tokenizer is not None:
        tokenizer = load_tokenizer(str(saved_tokenizer))
    else:
        tokenizer = recipe_tokenizer(recipe)
    parts = text_parts(recipe, tokenizer, progress=progress)
    batches = PackedBatches(
        parts.store, parts.train, length=recipe.batch.length, rows=recipe.batch.rows, seed=recipe.seed
    )
    scored = int((parts.store.lengths(parts.train) - 1).sum())
    return Inputs(
        batches,
        HeldOutText(parts.held_out_store, parts.held_out, recipe.evaluation.max_bytes),
        len(tokenizer),
        tokenizer,
        float(parts.store.num_bytes[parts.train].sum() / scored),
    )


def recipe_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """The tokenizer a text recipe names; `bpe:N` is trained on the recipe's training documents only."""
    assert recipe.tokenizer is not None

    def training_texts() -> Iterator[str]:
        # Which documents are held out does not depend on the tokenizer, and bytes need no training.
        parts = text_parts(recipe, load_tokenizer("byte"))
        return (document.text for document in part_documents(recipe, parts, "train"))

    return load_tokenizer(recipe.tokenizer, training_texts=training_texts)


def text_parts(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", *, progress: Progress | None = None) -> TextParts:
    """Tokenises the sources of a text recipe and divides them by document.

    The division depends on the texts, `data` and nothing else: not on the tokenizer, not on `seed`.

    Raises:
        UsageError: the sources cannot be used.
    """
    data = recipe.data
    assert isinstance(data, TextData)
    store = _store(data.source, data, tokenizer, data.max_bytes, progress)
    if data.valid_source is not None:
        held_out_store = _store(data.valid_source, data, tokenizer, None, progress)
        held_out = np.arange(held_out_store.num_documents)
        train = np.arange(store.num_documents)
    else:
        assert data.held_out is not None
        held_out_store = store
        division = split_documents(store, {"held_out": data.held_out})
        train, held_out = division["train"], division["held_out"]
    if data.train_bytes is not None and data.train_bytes < int(store.num_bytes[train].sum()):
        first = {} if data.held_out is None else {"held_out": data.held_out}
        train = split_documents(store, {**first, "used": data.train_bytes})["used"]
    return TextParts(store, train, held_out_store, held_out)


def part_documents(recipe: Recipe, parts: TextParts, part: Literal["train", "held_out"]) -> Iterator[Document]:
    """The documents themselves of one part, in the order of their indices."""
    data = recipe.data
    assert isinstance(data, TextData)
    if part == "held_out" and data.valid_source is not None:
        source: str | list[str] = data.valid_source
    else:
        source = data.source
    wanted = set(getattr(parts, part).tolist())
    documents = iter_documents(source, text_field=data.text_field, source_field=data.source_field)
    for index, document in enumerate(documents):
        if index in wanted:
            yield document
            wanted.remove(index)
        if not wanted:
            return


def cache_folder(data: TextData) -> Path:
    """Where tokens are cached: `data.cache_dir`, or flash-gsa's folder in the user's cache."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash-gsa" / "tokens"


def _store(
    source: str | list[str],
    data: TextData,
    tokenizer: "PreTrainedTokenizerFast",
    max_bytes: int | None,
    progress: Progress | None,
) -> TokenStore:
    return prepare_tokens(
        source,
        tokenizer,
        cache_dir=cache_folder(data),
        text_field=data.text_field,
        source_field=data.source_field,
        max_bytes=max_bytes,
        progress=progress,
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
