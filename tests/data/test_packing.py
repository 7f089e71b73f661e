import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data import NOT_SCORED, PackedBatches, Part, preparation, prepare_tokens, split_documents
from flash_gsa.errors import UsageError

sizes = st.tuples(st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))
documents = st.one_of(st.none(), st.sets(st.integers(0, 59), min_size=1).map(lambda chosen: np.array(sorted(chosen))))


@pytest.fixture(scope="module")
def sharded(corpus, byte_tokenizer, tmp_path_factory):
    """The same documents as in `store`, in many shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_SHARD_BYTES", 700)
        store = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path_factory.mktemp("sharded"))
    assert len(store.shards) > 5
    return store


def circle(store, documents):
    """The definition, document by document: tokens, targets, and where documents begin."""
    tokens, targets, begins = [], [], []
    for index in range(60) if documents is None else documents:
        text = store.document(int(index)).tolist()
        begins.append(len(tokens))
        tokens += text
        targets += [*text[1:], NOT_SCORED]
    return np.array(tokens), np.array(targets), begins


def rows_of(batch, length):
    """(input_ids, targets, where sequences begin within the row) of each row."""
    ids, targets = batch.input_ids.reshape(-1, length), batch.targets.reshape(-1, length)
    bounds = batch.cu_seqlens[:-1].numpy()
    return [(ids[i].tolist(), targets[i].tolist(), bounds[bounds // length == i] % length) for i in range(len(ids))]


@given(sizes, documents)
@settings(deadline=None, max_examples=40)
def test_an_epoch_is_the_circle_cut_into_rows(store, sharded, size, documents):
    length, rows, seed = size
    tokens, targets, begins = circle(store, documents)
    batches = PackedBatches(Part(sharded, documents), length=length, rows=rows, seed=seed)
    assert batches.epoch_tokens == len(tokens)
    per_epoch = -(-len(tokens) // length)
    found = []
    for index in range(min(-(-per_epoch // rows), 60)):
        batch = next(batches)
        assert batch.input_ids.shape == batch.targets.shape == (1, length * rows)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.num_tokens == length * rows
        starts = batches._rows[0].starts(np.arange(index * rows, (index + 1) * rows)).tolist()
        for start, (ids, wanted, bounds) in zip(starts, rows_of(batch, length), strict=True):
            where = (start + np.arange(length)) % len(tokens)
            assert ids == tokens[where].tolist()
            assert wanted == targets[where].tolist()
            assert bounds.tolist() == np.flatnonzero(np.isin(where, begins) | (np.arange(length) == 0)).tolist()
        found += starts
    # Rows of one epoch lie end to end.
    found = sorted(found[:per_epoch])
    assert (np.diff(found) % length == 0).all()
    assert len(set(found)) == len(found)


def test_every_token_once_an_epoch(store):
    documents = split_documents(store, {"valid": 0.3})["train"]
    expected = np.concatenate([store.document(i) for i in documents])
    batches = PackedBatches(Part(store, documents), length=1, rows=len(expected), seed=5)
    for epoch in range(2):
        assert sorted(next(batches).input_ids[0].tolist()) == sorted(expected.tolist())
        assert batches.epochs == [epoch + 1]


def test_no_more_than_a_row_comes_twice_an_epoch(store):
    batches = PackedBatches(Part(store), length=64, rows=1, seed=5)
    seen = [t for _ in range(-(-store.num_tokens // 64)) for t in next(batches).input_ids[0].tolist()]
    every = np.bincount(np.concatenate([store.document(i) for i in range(60)]))
    assert (np.bincount(seen, minlength=len(every)) >= every).all()
    assert 0 <= len(seen) - store.num_tokens < 64


def test_epochs_differ_in_order_and_in_where_rows_begin_and_so_do_seeds(store):
    def order(seed, epoch):
        rows = PackedBatches(Part(store), length=8, rows=1, seed=seed)._rows[0]
        starts = rows.starts(epoch * rows.per_epoch + np.arange(rows.per_epoch))
        return (starts - starts.min()).tolist(), int(starts.min())

    assert order(0, 0) == order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert order(0, 0)[0] != other[0]
        assert order(0, 0)[1] != other[1]


def equal(batch, other):
    return all(torch.equal(getattr(batch, n), getattr(other, n)) for n in ("input_ids", "targets", "cu_seqlens"))


@given(sizes, st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_any_batch_at_once(store, size, indices):
    length, rows, seed = size
    batches = PackedBatches(Part(store), length=length, rows=rows, seed=seed)
    in_order = [next(batches) for _ in range(max(indices) + 1)]
    assert all(equal(batches.batch(i), in_order[i]) for i in indices)
    assert batches.position == max(indices) + 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_processes_together_have_the_rows_of_the_batch(store, ranks):
    parts = [Part(store, np.arange(20), 0.7), Part(store, np.arange(20, 60), 0.3)]
    batches = PackedBatches(parts, length=32, rows=8, seed=1)
    whole = rows_of(batches.batch(5), 32)
    shared = [rows_of(batches.batch(5, slice(rank, None, ranks)), 32) for rank in range(ranks)]
    for i, (ids, targets, bounds) in enumerate(whole):
        row = shared[i % ranks][i // ranks]
        assert (row[0], row[1], row[2].tolist()) == (ids, targets, bounds.tolist())


def test_sources_are_mixed_by_weight_and_each_has_its_own_epochs(store):
    halves = split_documents(store, {"left": 0.5})
    left, right = (np.concatenate([store.document(i) for i in d]) for d in (halves["left"], halves["train"]))
    parts = [Part(store, halves["left"], 3), Part(store, halves["train"], 1)]
    batches = PackedBatches(parts, length=1, rows=4 * len(right), seed=2)  # one epoch of the lighter source
    every = np.bincount(next(batches).input_ids[0], minlength=300)
    assert batches.epochs == [3 * len(right) / len(left), 1.0]
    whole, rest = divmod(3 * len(right), len(left))
    twice = np.bincount(left, minlength=300) * whole + np.bincount(right, minlength=300)
    assert (every >= twice).all()
    assert (every - twice).sum() == rest


def test_equal_weights_are_no_weights(store):
    one = PackedBatches(Part(store, weight=5.0), length=32, rows=3, seed=0)
    assert equal(one.batch(7), PackedBatches([Part(store)], length=32, rows=3, seed=0).batch(7))


def test_resume_equals_uninterrupted(store):
    def make():
        parts = [Part(store, np.arange(30), 0.6), Part(store, np.arange(30, 60), 0.4)]
        return PackedBatches(parts, length=64, rows=2, seed=3)

    whole = make()
    expected = [next(whole) for _ in range(120)]
    first = make()
    for _ in range(57):
        next(first)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(equal(next(second), expected[i]) for i in range(57, 120))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 32}, "length was 64"),
        ({"rows": 3}, "rows was 2"),
        ({"seed": 4}, "seed was 3"),
        ({"documents": np.arange(1, 60)}, "data was"),
        ({"documents": None}, "data was"),
        ({"weight": 2.0}, "weights was"),
    ],
)
def test_refuses_a_position_in_other_data(store, change, named):
    def make(length=64, rows=2, seed=3, documents=np.arange(59), weight=1.0):  # noqa: B008
        return PackedBatches([Part(store, documents, weight), Part(store)], length=length, rows=rows, seed=seed)

    with pytest.raises(UsageError, match=named):
        make(**change).load_state_dict(make().state_dict())


def test_refuses_nothing_to_pack(store):
    with pytest.raises(UsageError, match="no documents"):
        PackedBatches(Part(store, np.arange(0)), length=8, rows=1, seed=0)
    for length, rows in ((0, 1), (8, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            PackedBatches(Part(store), length=length, rows=rows, seed=0)


def test_cu_seqlens_stays_on_the_cpu(store):
    batch = PackedBatches(Part(store), length=8, rows=1, seed=0).batch(0).to("meta")
    assert batch.input_ids.device.type == batch.targets.device.type == "meta"
    assert batch.cu_seqlens.device.type == "cpu"
