"""Tokenised documents on disk: Arrow shards, memory-mapped, and a manifest that vouches for them.

    KEY/
      shard-00000.arrow …   see shards.py
      manifest.json         see manifest.py; written last
      verified.json         see verification.py
      lock                  held by the process that builds or verifies

Opening maps the shards and reads their schemas: what is in memory does not grow with the number of documents.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flash_gsa.data.manifest import WHOLE, Contents, ShardRecord, read_manifest
from flash_gsa.data.shards import Shard, open_shard
from flash_gsa.data.verification import Progress, Verify, verify_shards
from flash_gsa.errors import UsageError


class DamagedShard(UsageError):
    """Tokens that were read are not what was written."""


@dataclass(frozen=True)
class TokenStore:
    """Documents 0, 1, … of one store or of several, as tokens.

    Tokens are counted through: document i begins at token `starts(i)` of the store, and the next one where it ends.

    Attributes:
        key: names the contents (source and tokenizer).
        shards: at least one.
        num_bytes: of text.
        folder: where it lies; None for several stores joined.
        vocab_size: token ids are below this, and a shard that holds others is refused when they are read; None: any.
    """

    key: str
    shards: Sequence[Shard]
    num_bytes: int
    folder: Path | None = None
    vocab_size: int | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        expected: Contents | None = None,
        verify: Verify = "once",
        began: float | None = None,
        progress: Progress | None = None,
    ) -> "TokenStore":
        """Open the store in `folder`. File sizes are always checked.

        Args:
            expected: what it must hold.
            verify: compare sha256 sums too: "once" of shards not read before, or changed since; True: of all.
            began: with `verify=True`, shards that any process read after this time (seconds since 1970) are not read
                again; None: now.
            progress: called with the bytes that were read to compare, and those there are to read.

        Raises:
            UsageError: no manifest, or not of `expected`; a shard is missing, changed, or not of this store.
        """
        manifest = read_manifest(folder / WHOLE, expected)
        if manifest is None:
            raise UsageError(f"{folder} holds no whole token store: there is no {WHOLE}. prepare_tokens builds it")
        for record in manifest.shards:
            _check_size(folder / record.file, record)
        key = manifest.contents.key
        shards = [
            open_shard(folder / record.file, key, number, manifest.labels, record.sha256)
            for number, record in enumerate(manifest.shards)
        ]
        for record, shard in zip(manifest.shards, shards, strict=True):
            if (len(shard.num_bytes), len(shard.tokens)) != (record.documents, record.tokens):
                raise UsageError(
                    f"the shard {folder / record.file} holds {len(shard.num_bytes):,} documents of "
                    f"{len(shard.tokens):,} tokens, the manifest expects {record.documents:,} of {record.tokens:,}. "
                    f"Delete the folder {folder}; it is built again"
                )
        if verify:
            since = 0.0 if verify == "once" else time.time() if began is None else began
            verify_shards(folder, manifest.shards, since=since, progress=progress)
        return cls(key, shards, sum(record.bytes for record in manifest.shards), folder)

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """The documents of several stores, one after the other."""
        if len(stores) == 1:
            return stores[0]
        shards = [shard for store in stores for shard in store.shards]
        sizes = [store.vocab_size for store in stores if store.vocab_size is not None]
        return cls(
            "+".join(store.key for store in stores),
            shards,
            sum(store.num_bytes for store in stores),
            vocab_size=max(sizes) if len(sizes) == len(stores) else None,
        )

    def labelled(self, label: str) -> "TokenStore":
        """The same documents, all with this label."""
        return replace(self, shards=[replace(shard, labels=[label] * len(shard.labels)) for shard in self.shards])

    @property
    def num_documents(self) -> int:
        return int(self._first_document[-1])

    @property
    def num_tokens(self) -> int:
        return int(self._first_token[-1])

    def sizes(self, documents: np.ndarray | None = None) -> np.ndarray:
        """UTF-8 bytes of the text of each of `documents` (None: all), int64."""
        return self._gather(documents, np.int64, lambda shard, first, here: shard.num_bytes[here])

    def digests(self, documents: np.ndarray | None = None) -> np.ndarray:
        """A hash of the text of each of `documents` (None: all), uint64."""
        return self._gather(documents, np.uint64, lambda shard, first, here: shard.digest[here])

    def starts(self, documents: np.ndarray | None = None) -> np.ndarray:
        """The token at which each of `documents` (None: all) begins, int64."""
        return self._gather(documents, np.int64, lambda shard, first, here: first + shard.offsets[:-1][here])

    def lengths(self, documents: np.ndarray | None = None) -> np.ndarray:
        """Number of tokens of each of `documents` (None: all), bos and eos counted; int64."""
        return self._gather(
            documents, np.int64, lambda shard, first, here: shard.offsets[1:][here] - shard.offsets[:-1][here]
        )

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, a view of the file."""
        shard, i = self._find(index)
        return self._in_vocabulary(shard, shard.tokens[shard.offsets[i] : shard.offsets[i + 1]])

    def label(self, index: int) -> str:
        """The source label of one document."""
        shard, i = self._find(index)
        return shard.labels[shard.source[i]]

    def read(self, start: int, tokens: np.ndarray, begins: np.ndarray) -> None:
        """Fill `tokens` with those from token `start` on; set `begins` where a document begins (it is not cleared)."""
        done = 0
        while done < len(tokens):
            number = int(np.searchsorted(self._first_token, start + done, side="right")) - 1
            shard, first = self.shards[number], start + done - int(self._first_token[number])
            count = min(len(tokens) - done, len(shard.tokens) - first)
            tokens[done : done + count] = self._in_vocabulary(shard, shard.tokens[first : first + count])
            inside = slice(*np.searchsorted(shard.offsets, np.array([first, first + count])))
            begins[done + shard.offsets[inside] - first] = True
            done += count

    @cached_property
    def _first_document(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard.num_bytes) for shard in self.shards)])

    @cached_property
    def _first_token(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard.tokens) for shard in self.shards)])

    def _find(self, document: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return self.shards[number], int(document - self._first_document[number])

    def _in_vocabulary(self, shard: Shard, tokens: np.ndarray) -> np.ndarray:
        # Where nothing else compares ids, on a GPU, others end a run with an error that names neither text nor file.
        if self.vocab_size is not None and (highest := int(tokens.max(initial=0))) >= self.vocab_size:
            raise DamagedShard(
                f"the shard {shard.path} is damaged: it holds token id {highest}, and the vocabulary has "
                f"{self.vocab_size} ids. Delete this shard; it is built again alone. data.verify=true (verify=True) "
                "compares the checksums of all shards"
            )
        return tokens

    def _gather(
        self, documents: np.ndarray | None, dtype: Any, value: Callable[[Shard, int, np.ndarray | slice], np.ndarray]
    ) -> np.ndarray:
        """`value(shard, its first token, documents within it)` of `documents`, in their order."""
        if documents is None:
            parts = [
                value(shard, first, slice(None))
                for shard, first in zip(self.shards, self._first_token.tolist(), strict=False)
            ]
            return np.concatenate(parts, dtype=dtype)
        documents = np.asarray(documents, np.int64)
        result = np.empty(len(documents), dtype)
        numbers = np.searchsorted(self._first_document, documents, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        edges = np.searchsorted(numbers[order], np.arange(len(self.shards) + 1)).tolist()
        for number, (begin, end) in enumerate(pairwise(edges)):
            if begin < end:
                here = order[begin:end]
                within = documents[here] - self._first_document[number]
                result[here] = value(self.shards[number], int(self._first_token[number]), within)
        return result


def _check_size(path: Path, record: ShardRecord) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UsageError(f"the shard {path} is missing. prepare_tokens builds it again alone") from None
    if size != record.size:
        raise UsageError(
            f"the shard {path} is damaged: it has {size:,} bytes, and the manifest expects {record.size:,} (sha256 "
            f"{record.sha256}). Delete this shard; it is built again alone"
        )
