import doctest
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data import NOT_SCORED, MQARBatches, mqar, multi_query_associative_recall
from flash_gsa.errors import UsageError


def test_worked_example():
    result = doctest.testmod(mqar)
    assert result.attempted == 2
    assert result.failed == 0


@given(
    st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 1), st.booleans(), st.integers(0, 99)
)
@settings(deadline=None)
def test_every_key_is_asked_for_once_and_answered_by_its_value(pairs, more_length, more_vocab, power, fill, seed):
    length, vocab = 4 * pairs + more_length, 2 * pairs + 2 + more_vocab
    inputs, targets = multi_query_associative_recall(5, length, pairs, vocab, power, fill, seed=seed)
    assert inputs.shape == targets.shape == (5, length)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0
    assert inputs.max() < vocab
    for row, target in zip(inputs, targets, strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert (keys > 0).all()
        assert (keys < vocab // 2).all()
        assert (values >= vocab // 2).all()
        asked = np.flatnonzero(target != NOT_SCORED)
        assert len(asked) == pairs
        assert (asked >= 2 * pairs).all()
        assert (asked % 2 == 0).all()
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[key] for key in row[asked]] == target[asked].tolist()
        assert sorted(row[asked]) == sorted(keys)
        if not fill:
            rest = np.setdiff1d(np.arange(2 * pairs, length), asked)
            assert (row[rest] == 0).all()


def test_gaps_follow_the_power_law():
    # With one pair the gap has exactly the stated distribution.
    space, power = 7, 0.3
    _, targets = multi_query_associative_recall(40_000, 2 + 2 * space, 1, 8, power, seed=1)
    gaps = ((targets != NOT_SCORED).argmax(1) - 2) // 2
    expected = np.arange(1, space + 1) ** (power - 1)
    expected /= expected.sum()
    found = np.bincount(gaps, minlength=space) / len(gaps)
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(expected.max() / len(gaps)))


def test_gaps_are_drawn_one_after_the_other():
    # P(first = i, second = j) = w_i · w_j / (1 − w_i) for weights that sum to one.
    _, targets = multi_query_associative_recall(60_000, 10, 2, 8, 0.01, False, seed=2)
    inputs, _ = multi_query_associative_recall(60_000, 10, 2, 8, 0.01, False, seed=2)
    gaps = np.stack([((inputs[:, 4:] == inputs[:, [k]]).argmax(1)) // 2 for k in (0, 2)], 1)
    assert (targets != NOT_SCORED).sum() == 120_000
    weights = np.arange(1, 4) ** -0.99
    weights /= weights.sum()
    for i in range(3):
        for j in range(3):
            expected = 0.0 if i == j else weights[i] * weights[j] / (1 - weights[i])
            assert abs(((gaps == [i, j]).all(1)).mean() - expected) < 0.01


def test_blocks_of_rows_do_not_repeat(monkeypatch):
    monkeypatch.setattr(mqar, "_SCRATCH", 100)
    inputs, _ = multi_query_associative_recall(50, 16, 4, 64, seed=0)
    assert len({tuple(row) for row in inputs.tolist()}) == 50


def test_batches():
    batches = MQARBatches(3, 16, 4, 64, seed=7)
    first, second = next(batches), next(batches)
    assert first.input_ids.shape == first.targets.shape == (3, 16)
    assert first.input_ids.dtype == first.targets.dtype == torch.int64
    assert first.cu_seqlens is None
    assert not torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(batches.batch(0).input_ids, first.input_ids)
    assert not torch.equal(MQARBatches(3, 16, 4, 64, seed=8).batch(0).input_ids, first.input_ids)


def test_rows_of_a_batch_without_the_others():
    batches = MQARBatches(6, 16, 4, 64, seed=7)
    whole = batches.batch(2)
    for rows in (slice(None), slice(1, 6, 2), slice(4, 5)):
        part = batches.batch(2, rows)
        assert torch.equal(part.input_ids, whole.input_ids[rows])
        assert torch.equal(part.targets, whole.targets[rows])
    # A row is one of the task on its own, whatever batches the stream is cut into.
    other = MQARBatches(4, 16, 4, 64, seed=7).batch(3)
    assert torch.equal(other.input_ids, whole.input_ids[:4])
    inputs, targets = multi_query_associative_recall(1, 16, 4, 64, seed=np.random.SeedSequence(7, spawn_key=(0, 12)))
    assert inputs[0].tolist() == whole.input_ids[0].tolist()
    assert targets[0].tolist() == whole.targets[0].tolist()


def test_held_out_stream_shares_no_row():
    train, held_out = (MQARBatches(50, 16, 4, 64, seed=7, held_out=h) for h in (False, True))
    rows = [{tuple(r) for _ in range(20) for r in next(s).input_ids.tolist()} for s in (train, held_out)]
    assert [len(r) for r in rows] == [1000, 1000]
    assert rows[0].isdisjoint(rows[1])


def test_resume():
    whole, part = MQARBatches(2, 16, 4, 64), MQARBatches(2, 16, 4, 64)
    expected = [next(whole).input_ids for _ in range(6)]
    for _ in range(3):
        next(part)
    resumed = MQARBatches(2, 16, 4, 64)
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for i in range(3, 6):
        assert torch.equal(next(resumed).input_ids, expected[i])
    for other in (
        MQARBatches(2, 16, 3, 64),
        MQARBatches(2, 16, 4, 64, seed=1),
        MQARBatches(2, 16, 4, 64, held_out=True),
    ):
        with pytest.raises(UsageError, match="cannot go on in the MQAR stream"):
            other.load_state_dict(part.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 4, 64), "0 examples"),
        ((1, 16, 0, 64), "0 key-value pairs"),
        ((1, 15, 4, 64), "length of at least 16"),
        ((1, 16, 4, 9), r"has 3 keys, and 4 different ones.*at least 10"),
        ((1, 16, 4, 64, 0.0), r"power_a is 0\.0"),
        ((1, 16, 4, 64, 1.5), r"power_a is 1\.5"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        multi_query_associative_recall(*arguments)
    with pytest.raises(UsageError, match=message):
        MQARBatches(*arguments)
