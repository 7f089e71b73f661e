"""Training batches from a token store: the shuffled documents as one endless stream, cut into shuffled rows."""

import hashlib
from typing import Any

import numpy as np
import torch

from flash_gsa.data.batches import NOT_SCORED, Batch
from flash_gsa.data.store import TokenStore
from flash_gsa.errors import UsageError


class PackedBatches:
    """Endless packed batches of `rows` rows of `length` tokens.

    Each epoch puts `documents` in an order drawn from (seed, epoch); epochs follow each other in one stream, which
    is cut into rows. The rows of about one epoch at a time are drawn in an order of their own: a book is a single
    document of hundreds of rows, and batches that held neighbouring rows would be about one book for minutes.
    A sequence (see `Batch.cu_seqlens`) begins at each row and at each document. The target at a position is the
    next token of the stream, also where that lies in the next row; at the last token of a document it is −100.

    Batch i depends on nothing but the arguments and i: `batch(i)` gives any at once, and to resume is to set
    the position.

    Args:
        store: the tokens.
        documents: indices of the documents to use (see `split_documents`).
        length: tokens a row.
        rows: rows a batch.
        seed: decides the order.

    Raises:
        UsageError: no documents, or a length or number of rows below 1.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, *, length: int, rows: int, seed: int) -> None:
        if length < 1 or rows < 1:
            raise UsageError(f"length is {length} and rows is {rows}, expected whole numbers of at least 1")
        self.store, self.length, self.rows, self.seed = store, length, rows, seed
        self.position = 0
        self.documents = np.asarray(documents, np.int64)
        self.epoch_tokens = int(store.lengths(self.documents).sum())
        if not self.epoch_tokens:
            raise UsageError("there are no documents to make batches of. Name another source or hold out less")
        self._identity = hashlib.sha256(store.key.encode() + self.documents.tobytes()).hexdigest()[:16]
        self._block_rows = -(-self.epoch_tokens // length)
        self._block: tuple[int, np.ndarray] = (-1, self.documents)
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, self.documents, self.documents)

    @property
    def epochs(self) -> float:
        """How often the documents have been gone through up to the current position."""
        return self.position * self.rows * self.length / self.epoch_tokens

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, index: int) -> Batch:
        """Batch `index` ≥ 0: `input_ids` and `targets` `[1, rows·length]`; does not move the position."""
        length = self.length
        tokens = np.empty((self.rows, length), np.int64)
        targets = np.empty((self.rows, length), np.int64)
        boundary = np.zeros((self.rows, length), bool)
        for i in range(self.rows):
            row, begins = self._stream(self._row(index * self.rows + i) * length, length + 1)
            tokens[i], boundary[i] = row[:-1], begins[:-1]
            targets[i] = np.where(begins[1:], NOT_SCORED, row[1:])
        boundary[:, 0] = True
        cu_seqlens = np.append(np.flatnonzero(boundary), tokens.size).astype(np.int32)
        return Batch(
            torch.from_numpy(tokens.reshape(1, -1)),
            torch.from_numpy(targets.reshape(1, -1)),
            torch.from_numpy(cu_seqlens),
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "position": self.position,
            "data": self._identity,
            "length": self.length,
            "rows": self.rows,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UsageError: it is a position in other data, or in batches of another size or order.
        """
        for name, value in self.state_dict().items():
            if name != "position" and state[name] != value:
                raise UsageError(
                    f"cannot go on in the data: {name} was {state[name]!r} when the run was saved and is "
                    f"{value!r} now. Resume with the settings and data of the saved run, or begin a new run"
                )
        self.position = state["position"]

    def _stream(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens of the stream from `start` on (int64), and whether each begins a document."""
        tokens = np.empty(count, np.int64)
        begins = np.zeros(count, bool)
        done = 0
        while done < count:
            epoch, first = divmod(start + done, self.epoch_tokens)
            last = min(first + count - done, self.epoch_tokens)
            order, ends = self._order(epoch)
            # The documents that overlap first … last − 1, and the part of each that does.
            here = slice(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last - 1, "right") + 1)
            documents = order[here]
            begin = ends[here] - self.store.lengths(documents)
            low, high = np.maximum(begin, first), np.minimum(ends[here], last)
            source = self.store.offsets[documents] + low - begin
            where = np.repeat(source - (low - first), high - low) + np.arange(last - first)
            tokens[done : done + last - first] = self.store.tokens[where]
            begins[done + (low - first)[low == begin]] = True
            done += last - first
        return tokens, begins

    def _row(self, index: int) -> int:
        """Which row of the stream comes as the `index`-th: a permutation within blocks of an epoch's rows."""
        block, place = divmod(index, self._block_rows)
        if self._block[0] != block:
            self._block = (block, np.random.default_rng([self.seed, block, 1]).permutation(self._block_rows))
        return block * self._block_rows + int(self._block[1][place])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of this epoch, and where each ends in it."""
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.documents)
            self._epoch = (epoch, order, np.cumsum(self.store.lengths(order)))
        return self._epoch[1:]
