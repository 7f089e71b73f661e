import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data import NOT_SCORED, PackedBatches, split_documents
from flash_gsa.errors import UsageError

ALL = np.arange(60)
sizes = st.tuples(st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))


def stream_by_hand(store, documents, seed, epochs):
    """The definition, document by document: (token, target) of the endless stream's first epochs, and where
    documents begin."""
    tokens, targets, begins = [], [], set()
    for epoch in range(epochs):
        for index in np.random.default_rng([seed, epoch]).permutation(documents):
            text = store.document(index).tolist()
            begins.add(len(tokens))
            tokens += text
            targets += [*text[1:], NOT_SCORED]
    return tokens, targets, begins


@given(sizes)
@settings(deadline=None, max_examples=30)
def test_batches_are_the_rows_of_the_stream(store, size):
    length, rows, seed = size
    batches = PackedBatches(store, ALL, length=length, rows=rows, seed=seed)
    tokens, targets, begins = stream_by_hand(store, ALL, seed, 3)
    block = -(-batches.epoch_tokens // length)
    seen = []
    for _ in range(min(-(-block // rows), 40)):
        batch = next(batches)
        assert batch.input_ids.shape == batch.targets.shape == (1, length * rows)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.num_tokens == length * rows
        bounds = set(batch.cu_seqlens.tolist())
        assert bounds >= set(range(0, length * rows + 1, length))
        for i in range(rows):
            row = batches._row(len(seen))
            here = slice(row * length, (row + 1) * length)
            there = slice(i * length, (i + 1) * length)
            assert batch.input_ids[0, there].tolist() == tokens[here]
            assert batch.targets[0, there].tolist() == targets[here]
            inside = {b - here.start for b in begins if here.start < b < here.stop}
            assert {b - there.start for b in bounds if there.start < b < there.stop} == inside
            seen.append(row)
    first_block = seen[:block]
    assert len(set(first_block)) == len(first_block)
    assert max(first_block) < block


def test_rows_are_shuffled_so_that_a_long_document_does_not_fill_batches(store):
    batches = PackedBatches(store, ALL, length=8, rows=1, seed=0)
    rows = [batches._row(i) for i in range(batches._block_rows)]
    assert sorted(rows) == list(range(batches._block_rows))
    neighbours = sum(b == a + 1 for a, b in pairwise(rows))
    assert neighbours < len(rows) / 10


def test_every_token_once_an_epoch(store):
    documents = split_documents(store, {"valid": 0.3})["train"]
    batches = PackedBatches(store, documents, length=1, rows=1, seed=5)
    for epoch in range(2):
        seen = [next(batches).input_ids.item() for _ in range(batches.epoch_tokens)]
        expected = np.concatenate([store.document(i) for i in documents])
        assert sorted(seen) == sorted(expected.tolist())
        assert batches.epochs == epoch + 1


def test_epochs_differ_in_order_and_so_do_seeds(store):
    def first_row(seed, start_epoch):
        batches = PackedBatches(store, ALL, length=1, rows=1, seed=seed)
        start = start_epoch * batches.epoch_tokens
        return [batches.batch(start + i).input_ids.item() for i in range(200)]

    assert first_row(0, 0) != first_row(0, 1)
    assert first_row(0, 0) != first_row(1, 0)
    assert first_row(0, 1) == first_row(0, 1)


@given(sizes, st.lists(st.integers(0, 50), min_size=1, max_size=8))
@settings(deadline=None, max_examples=20)
def test_any_batch_at_once(store, size, indices):
    length, rows, seed = size
    batches = PackedBatches(store, ALL, length=length, rows=rows, seed=seed)
    in_order = [next(batches) for _ in range(max(indices) + 1)]
    for i in indices:
        batch = batches.batch(i)
        for name in ("input_ids", "targets", "cu_seqlens"):
            assert torch.equal(getattr(batch, name), getattr(in_order[i], name))
    assert batches.position == max(indices) + 1


def test_resume_equals_uninterrupted(store):
    def make():
        return PackedBatches(store, ALL, length=64, rows=2, seed=3)

    whole = make()
    expected = [next(whole) for _ in range(120)]
    first = make()
    for _ in range(57):
        next(first)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for i in range(57, 120):
        batch = next(second)
        assert torch.equal(batch.input_ids, expected[i].input_ids)
        assert torch.equal(batch.cu_seqlens, expected[i].cu_seqlens)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 32}, "length was 64"),
        ({"rows": 3}, "rows was 2"),
        ({"seed": 4}, "seed was 3"),
        ({"documents": ALL[1:]}, "data was"),
    ],
)
def test_refuses_a_position_in_other_data(store, change, named):
    settings_ = {"documents": ALL, "length": 64, "rows": 2, "seed": 3}
    state = PackedBatches(store, **settings_).state_dict()
    with pytest.raises(UsageError, match=named):
        PackedBatches(store, **(settings_ | change)).load_state_dict(state)


def test_refuses_nothing_to_pack(store):
    with pytest.raises(UsageError, match="no documents"):
        PackedBatches(store, ALL[:0], length=8, rows=1, seed=0)
    for length, rows in ((0, 1), (8, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            PackedBatches(store, ALL, length=length, rows=rows, seed=0)


def test_cu_seqlens_stays_on_the_cpu(store):
    batch = PackedBatches(store, ALL, length=8, rows=1, seed=0).batch(0).to("meta")
    assert batch.input_ids.device.type == batch.targets.device.type == "meta"
    assert batch.cu_seqlens.device.type == "cpu"
