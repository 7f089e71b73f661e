"""Training batches from token stores: documents as one text without end, cut into rows that come in a drawn order."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from flash_gsa.data.batches import NOT_SCORED, Batch
from flash_gsa.data.order import Mixture, Permutation
from flash_gsa.data.store import TokenStore
from flash_gsa.errors import UsageError


@dataclass(frozen=True)
class Part:
    """What is drawn from one source.

    Attributes:
        store: its tokens.
        documents: indices of those used (see `split_documents`); None: all, which takes no memory a document.
        weight: its share of the rows, in proportion to the weights of the other parts.
    """

    store: TokenStore
    documents: np.ndarray | None = None
    weight: float = 1.0


class PackedBatches:
    """Endless packed batches of `rows` rows of `length` tokens.

    The documents of a part, in the order in which they are stored, form a circle: after the last comes the first.
    Each epoch cuts it into rows, from a token on that is drawn from (seed, epoch), until all is in a row; so the last
    row may hold some tokens a second time. The rows come in an order drawn from (seed, epoch). With several parts,
    every stretch of rows holds them in the proportions of their weights, and each has epochs of its own.

    A sequence (see `Batch.cu_seqlens`) begins at each row and at each document. The target at a position is the next
    token of the circle, also where that lies in another row; at the last token of a document it is −100.

    Batch i depends on nothing but the arguments and i: any is made at once, and to resume is to set the position. A
    process that computes some rows of a batch asks for those only. `position` is the number of batches drawn.

    Args:
        parts: what is drawn from.
        length: tokens a row.
        rows: rows a batch, of all processes together.
        seed: decides the order.

    Raises:
        UsageError: no documents, a length or number of rows below 1, weights that cannot be kept.
    """

    def __init__(self, parts: Part | Sequence[Part], *, length: int, rows: int, seed: int) -> None:
        if length < 1 or rows < 1:
            raise UsageError(f"length is {length} and rows is {rows}, expected whole numbers of at least 1")
        self.parts = (parts,) if isinstance(parts, Part) else tuple(parts)
        self.length, self.rows, self.seed = length, rows, seed
        self.position = 0
        self._rows = [_Rows(part, length, (seed, number)) for number, part in enumerate(self.parts)]
        self._mixture = Mixture([part.weight for part in self.parts], (seed, len(self.parts)))

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(rows.text.num_tokens for rows in self._rows)

    @property
    def epochs(self) -> list[float]:
        """How often the documents of each part have been gone through up to the current position."""
        return self.epochs_after(self.position)

    def epochs_after(self, batches: int) -> list[float]:
        """How often after so many batches."""
        drawn = self._mixture.counts(batches * self.rows)
        return [count / rows.per_epoch for count, rows in zip(drawn, self._rows, strict=True)]

    @property
    def part_tokens(self) -> list[int]:
        """Tokens of the documents of each part."""
        return [rows.text.num_tokens for rows in self._rows]

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, index: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of batch `index` ≥ 0: `input_ids` and `targets` `[1, n·length]`; does not move the position."""
        places = index * self.rows + np.arange(self.rows)[rows]
        tokens = np.empty((len(places), self.length + 1), np.int64)
        begins = np.zeros((len(places), self.length + 1), bool)
        source, place = self._mixture(places)
        for number, part in enumerate(self._rows):
            mine = np.flatnonzero(source == number)
            for i, start in zip(mine.tolist(), part.starts(place[mine]).tolist(), strict=True):
                part.text.read(start, tokens[i], begins[i])
        targets = np.where(begins[:, 1:], NOT_SCORED, tokens[:, 1:])
        begins[:, 0] = True
        boundaries = np.flatnonzero(begins[:, :-1])
        return Batch(
            torch.from_numpy(tokens[:, :-1].reshape(1, -1)),
            torch.from_numpy(targets.reshape(1, -1)),
            torch.from_numpy(np.append(boundaries, targets.size).astype(np.int32)),
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "position": self.position,
            "data": [rows.text.identity for rows in self._rows],
            "weights": [part.weight for part in self.parts],
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
            if name != "position" and state.get(name) != value:
                raise UsageError(
                    f"cannot go on in the data: {name} was {state.get(name)!r} when the run was saved and is "
                    f"{value!r} now. Resume with the settings and data of the saved run, or begin a new run"
                )
        self.position = state["position"]


class _Circle:
    """The documents of a part one after the other, and again from the first."""

    def __init__(self, part: Part) -> None:
        self.store = part.store
        if part.documents is None:
            begins, ends, chosen = np.array([0]), np.array([self.store.num_tokens]), b"all"
        else:
            documents = np.unique(np.asarray(part.documents, np.int64))
            chosen = documents.tobytes()
            # Neighbours are one stretch of the store: where little is held out, there are few stretches.
            first = documents[np.diff(documents, prepend=-2) != 1]
            last = documents[np.diff(documents, append=np.iinfo(np.int64).max) != 1]
            begins, ends = self.store.starts(first), self.store.starts(last) + self.store.lengths(last)
        self._ends, self._until = ends, np.cumsum(ends - begins)  # of each stretch: in the store, and in the circle
        self.num_tokens = int(self._until[-1]) if len(ends) else 0
        self.identity = hashlib.sha256(self.store.key.encode() + chosen).hexdigest()[:16]
        if not self.num_tokens:
            raise UsageError("there are no documents to make batches of. Name another source or hold out less")

    def read(self, start: int, tokens: np.ndarray, begins: np.ndarray) -> None:
        """Fill `tokens` with those from `start` on, and set `begins` where a document begins (it is not cleared)."""
        done = 0
        while done < len(tokens):
            at = (start + done) % self.num_tokens
            stretch = int(np.searchsorted(self._until, at, side="right"))
            left = int(self._until[stretch]) - at
            here = slice(done, min(done + left, len(tokens)))
            self.store.read(int(self._ends[stretch]) - left, tokens[here], begins[here])
            done = here.stop


class _Rows:
    """The rows of a part, epoch after epoch, in the order in which they are drawn."""

    def __init__(self, part: Part, length: int, seed: tuple[int, ...]) -> None:
        self.text, self.length = _Circle(part), length
        self.per_epoch = -(-self.text.num_tokens // length)
        self._order = lru_cache(2)(lambda epoch: Permutation(self.per_epoch, (*seed, epoch, 0)))
        self._first = lru_cache(2)(lambda epoch: self._draw((*seed, epoch, 1)))

    def starts(self, places: np.ndarray) -> np.ndarray:
        """Where in the circle the rows at `places` begin."""
        epochs, within = np.divmod(places, self.per_epoch)
        starts = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            starts[here] = self._first(epoch) + self._order(epoch)(within[here]) * self.length
        return starts

    def _draw(self, seed: tuple[int, ...]) -> int:
        return int(np.random.default_rng(seed).integers(self.text.num_tokens))
