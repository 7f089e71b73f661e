"""Multi-query associative recall (MQAR), the recall task of Arora et al. 2023 (arXiv 2312.04927).

A row first lists pairs of a key and its value, then asks for the value of each key once. The gap between
a pair and its question follows a power law. This is the generator of the paper's "zoology" suite in
equations: D pairs, length T, vocabulary size V; keys are D different numbers of 1 … ⌊V/2⌋ − 1, values D different
numbers of ⌊V/2⌋ … V − 1;

    row[2i] = key_i,   row[2i + 1] = value_i                              i < D
    row[2D + 2·gap_i] = key_i,   target[2D + 2·gap_i] = value_i

where the gaps are drawn one after the other without replacement from 0 … S − 1, S = ⌊(T − 2D)/2⌋, with
probabilities ∝ (gap + 1)^(a − 1). Every other target is −100; every other position of the row holds a random
token of 0 … V − 1 (or 0).

A worked example: three pairs in 16 positions, the vocabulary 0 … 15 (keys 1 … 7, values 8 … 15).

    >>> inputs, targets = multi_query_associative_recall(1, 16, 3, 16, random_non_queries=False, seed=10)
    >>> print(*inputs[0]); print(*targets[0])
    6 8 4 12 2 11 0 0 4 0 0 0 6 0 2 0
    -100 -100 -100 -100 -100 -100 -100 -100 12 -100 -100 -100 8 -100 11 -100

The pairs are 6 → 8, 4 → 12, 2 → 11; their gaps are 3, 1 and 4, so 4 is asked for at position 6 + 2·1 = 8, where
12 is the answer, then 6 at position 12 and 2 at 14.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flash_gsa.data.batches import NOT_SCORED, Batch
from flash_gsa.errors import UsageError

# A block of rows is drawn at once; its scratch space is this many numbers at most.
_SCRATCH = 1 << 22


def multi_query_associative_recall(
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    vocab_size: int,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    *,
    seed: int | np.random.SeedSequence = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the task defined in the module's text.

    Args:
        num_examples: rows n.
        seq_len: length T, at least 4·num_kv_pairs.
        num_kv_pairs: D ≥ 1.
        vocab_size: V; ⌊V/2⌋ − 1 keys must be at least D.
        power_a: exponent a of the gaps; the smaller, the more questions come early.
        random_non_queries: fill what is neither pair nor question with random tokens, else with 0.
        seed: decides everything.

    Returns:
        (inputs, targets), int64 `[n, T]`. `targets[r, t]` is the value to be predicted at the question t, −100
        elsewhere.

    Raises:
        UsageError: the pairs do not fit the length or the vocabulary, or a number is out of range.
    """
    _check(num_examples, seq_len, num_kv_pairs, vocab_size, power_a)
    draw = _Draw([np.random.default_rng(seed)])
    return _rows(draw, num_examples, seq_len, num_kv_pairs, vocab_size, power_a, random_non_queries)


class _Draw:
    """Random numbers `[rows, width]`: all from one generator, or each row from its own."""

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self._generators = generators

    def exponential(self, rows: range, width: int) -> np.ndarray:
        return self._each(rows, lambda generator, shape: generator.standard_exponential(shape), width)

    def integers(self, rows: range, width: int, below: int) -> np.ndarray:
        return self._each(rows, lambda generator, shape: generator.integers(below, size=shape), width)

    def _each(self, rows: range, draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], width: int) -> Any:
        if len(self._generators) == 1:
            return draw(self._generators[0], (len(rows), width))
        return np.concatenate([draw(self._generators[row], (1, width)) for row in rows])


def _rows(
    draw: _Draw,
    num_examples: int,
    seq_len: int,
    num_kv_pairs: int,
    vocab_size: int,
    power_a: float,
    random_non_queries: bool,
) -> tuple[np.ndarray, np.ndarray]:
    context, first_value = 2 * num_kv_pairs, vocab_size // 2
    distance = np.arange(1, (seq_len - context) // 2 + 1)
    keys = 1 + _choose(draw, num_examples, num_kv_pairs, np.ones(first_value - 1))
    values = first_value + _choose(draw, num_examples, num_kv_pairs, np.ones(vocab_size - first_value))
    gaps = _choose(draw, num_examples, num_kv_pairs, distance ** (power_a - 1.0))
    if random_non_queries:
        inputs = draw.integers(range(num_examples), seq_len, vocab_size)
    else:
        inputs = np.zeros((num_examples, seq_len), np.int64)
    targets = np.full((num_examples, seq_len), NOT_SCORED)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    np.put_along_axis(inputs, context + 2 * gaps, keys, axis=1)
    np.put_along_axis(targets, context + 2 * gaps, values, axis=1)
    return inputs, targets


class MQARBatches:
    """Endless batches of the task, `[batch_size, seq_len]` without `cu_seqlens`.

    Row i of the stream depends on nothing but the arguments and i, so that some rows of a batch are made without the
    others. `held_out=True` gives a stream of its own, for evaluation: no random number of one stream is used in the
    other.

    Args:
        batch_size: rows a batch.
        seq_len, num_kv_pairs, vocab_size, power_a, random_non_queries: as for `multi_query_associative_recall`.
        seed: decides the stream.
        held_out: which of the seed's two streams.

    Raises:
        UsageError: as `multi_query_associative_recall`.
    """

    def __init__(
        self,
        batch_size: int,
        seq_len: int,
        num_kv_pairs: int,
        vocab_size: int,
        power_a: float = 0.01,
        random_non_queries: bool = True,
        *,
        seed: int = 0,
        held_out: bool = False,
    ) -> None:
        _check(batch_size, seq_len, num_kv_pairs, vocab_size, power_a)
        self.rows = batch_size
        self.task = (seq_len, num_kv_pairs, vocab_size, power_a, random_non_queries)
        self.seed, self.held_out = seed, held_out
        self.position = 0

    def __iter__(self) -> "MQARBatches":
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, index: int, rows: slice = slice(None)) -> Batch:
        """Rows `rows` of batch `index` ≥ 0; does not move the position."""
        places = range(index * self.rows, (index + 1) * self.rows)[rows]
        seeds = [np.random.SeedSequence(self.seed, spawn_key=(int(self.held_out), place)) for place in places]
        made = _rows(_Draw([np.random.default_rng(seed) for seed in seeds]), len(places), *self.task)
        inputs, targets = map(torch.from_numpy, made)
        return Batch(inputs, targets)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "position": self.position,
            "rows": self.rows,
            "task": list(self.task),
            "seed": self.seed,
            "held_out": self.held_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UsageError: it is a position in another task or stream.
        """
        for name, value in self.state_dict().items():
            if name != "position" and state[name] != value:
                raise UsageError(
                    f"cannot go on in the MQAR stream: {name} was {state[name]!r} when the run was saved and "
                    f"is {value!r} now. Resume with the settings of the saved run, or begin a new run"
                )
        self.position = state["position"]


def _choose(draw: _Draw, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """`[rows, count]`: indices drawn one after the other without replacement, probabilities ∝ `weights`.

    Give index j an exponential arrival time with rate `weights[j]`; those that arrive first, in order of arrival, have
    that distribution.
    """
    chosen = np.empty((rows, count), np.int64)
    step = max(1, _SCRATCH // len(weights))
    for start in range(0, rows, step):
        arrival = draw.exponential(range(start, min(start + step, rows)), len(weights)) / weights
        first = np.argpartition(arrival, count - 1, axis=1)[:, :count]
        order = np.take_along_axis(arrival, first, axis=1).argsort(axis=1)
        chosen[start : start + step] = np.take_along_axis(first, order, axis=1)
    return chosen


def _check(num_examples: int, seq_len: int, num_kv_pairs: int, vocab_size: int, power_a: float) -> None:
    if num_examples < 1 or num_kv_pairs < 1:
        raise UsageError(
            f"MQAR: {num_examples} examples of {num_kv_pairs} key-value pairs; expected at least 1 of each"
        )
    if 4 * num_kv_pairs > seq_len:
        raise UsageError(
            f"MQAR: {num_kv_pairs} key-value pairs and their questions need a length of at least {4 * num_kv_pairs}, "
            f"and seq_len is {seq_len}. Raise seq_len or lower num_kv_pairs"
        )
    if vocab_size // 2 - 1 < num_kv_pairs:
        raise UsageError(
            f"MQAR: a vocabulary of {vocab_size} has {max(vocab_size // 2 - 1, 0)} keys, and {num_kv_pairs} "
            f"different ones are needed. Raise vocab_size to at least {2 * num_kv_pairs + 2}"
        )
    if not 0 < power_a <= 1:
        raise UsageError(f"MQAR: power_a is {power_a}, expected a number above 0 and at most 1 (1: uniform gaps)")
