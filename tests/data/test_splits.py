import json

import numpy as np
import pytest

from flash_gsa.data import load_tokenizer, prepare_tokens, sample_documents, split_documents
from flash_gsa.errors import UsageError


def make_store(texts, folder, tokenizer):
    file = folder / f"{len(texts)}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare_tokens(str(file), tokenizer, cache_dir=folder / "cache")


def test_parts_are_disjoint_and_complete(store):
    parts = split_documents(store, {"valid": 0.1, "test": 500})
    assert list(parts) == ["train", "valid", "test"]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(60))
    for indices in parts.values():
        assert (np.diff(indices) > 0).all()


def test_parts_hold_what_was_asked_for_and_no_document_more(store):
    total = store.num_bytes
    parts = split_documents(store, {"valid": 0.1, "test": 500})
    longest = store.sizes().max()
    assert 0.1 * total <= store.sizes(parts["valid"]).sum() < 0.1 * total + longest
    assert 500 <= store.sizes(parts["test"]).sum() < 500 + longest


def test_seed_decides(store):
    first, same, other = (split_documents(store, {"valid": 0.2}, seed=seed)["valid"] for seed in (1, 1, 2))
    assert first.tolist() == same.tolist()
    assert first.tolist() != other.tolist()


def test_independent_of_the_tokenizer(store, corpus, tmp_path):
    tokenizer = load_tokenizer("bpe:300", training_texts=lambda: [corpus.read_text()] * 3)
    other = prepare_tokens(str(corpus), tokenizer, cache_dir=tmp_path)
    for part, indices in split_documents(store, {"valid": 0.2, "test": 300}).items():
        assert split_documents(other, {"valid": 0.2, "test": 300})[part].tolist() == indices.tolist()


def test_new_documents_do_not_reshuffle(tmp_path, byte_tokenizer):
    texts = [f"text {i}" for i in range(400)]
    before = split_documents(make_store(texts[:350], tmp_path, byte_tokenizer), {"valid": 0.2})["valid"]
    after = split_documents(make_store(texts, tmp_path, byte_tokenizer), {"valid": 0.2})["valid"]
    old = set(after[after < 350].tolist())
    # Where the share ends moves by a few documents; a new shuffle would exchange four fifths of them.
    assert len(old ^ set(before.tolist())) < 20


def test_equal_texts_are_on_one_side(tmp_path, byte_tokenizer):
    texts = [f"text {i % 20}" for i in range(200)]
    store = make_store(texts, tmp_path, byte_tokenizer)
    for size in (1, 0.13, 0.5):
        parts = split_documents(store, {"valid": size, "test": 1})
        groups = [{texts[i] for i in indices} for indices in parts.values()]
        assert sum(map(len, groups)) == 20
        assert all(groups)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({"train": 0.1}, "names 'train'"),
        ({"valid": 0}, "'valid' is 0, expected a share"),
        ({"valid": 1.5}, "'valid' is 1.5, expected a share"),
        ({"valid": -3}, "expected a share"),
        ({"valid": True}, "expected a share"),
        ({"valid": 10**9}, "leaves no document to train on"),
        ({"valid": 0.6, "test": 0.6}, "leaves no document to train on"),
    ],
)
def test_refused(store, held_out, message):
    with pytest.raises(UsageError, match=message):
        split_documents(store, held_out)


def test_a_sample_is_what_a_part_of_that_size_would_be(store):
    parts = split_documents(store, {"valid": 0.1, "sample": 900})
    train = split_documents(store, {"valid": 0.1})["train"]
    assert sample_documents(store, train, 900).tolist() == parts["sample"].tolist()
    assert set(sample_documents(store, train, 500)) < set(parts["sample"])


@pytest.mark.parametrize("less", [-1, 0, 1, 2])
def test_a_sample_may_take_every_document(store, less):
    everything = sample_documents(store, None, store.num_bytes - less)
    assert everything.tolist() == list(range(store.num_documents))
    assert sample_documents(store, everything[:0], 10).tolist() == []
