"""What a `data` section means: which documents are trained on, which are held out."""

import json

import numpy as np
import pytest

from flash_gsa.data import load_tokenizer
from flash_gsa.training.inputs import cache_folder, part_documents, prepare_inputs, recipe_tokenizer, text_parts


def texts(recipe, part, tokenizer=None):
    parts = text_parts(recipe, tokenizer or load_tokenizer("byte"))
    return [d.text for d in part_documents(recipe, parts, part)]


def test_parts_are_disjoint_and_all_there(make_recipe, tmp_path):
    recipe = make_recipe()
    everything = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    train, held_out = texts(recipe, "train"), texts(recipe, "held_out")
    assert sorted(train + held_out) == sorted(everything)
    assert 400 <= sum(map(len, held_out)) < 600


def test_parts_do_not_depend_on_tokenizer_or_seed(make_recipe):
    base = texts(make_recipe(), "held_out")
    assert texts(make_recipe("seed=5"), "held_out") == base
    other = make_recipe("tokenizer=bpe:300")
    assert texts(other, "held_out", recipe_tokenizer(other)) == base


def test_train_bytes_takes_a_fixed_sample_of_the_rest(make_recipe):
    full, some = make_recipe(), make_recipe("data.train_bytes=500")
    assert texts(some, "held_out") == texts(full, "held_out")
    assert set(texts(some, "train")) < set(texts(full, "train"))
    assert 500 <= sum(map(len, texts(some, "train"))) < 700
    assert texts(make_recipe("data.train_bytes=10_000_000"), "train") == texts(full, "train")


def test_a_separate_source_for_what_is_held_out(make_recipe, tmp_path):
    (tmp_path / "valid.txt").write_text("a text of its own")
    overrides = ["data.held_out=null", f"data.valid_source={tmp_path}/valid.txt"]
    recipe = make_recipe(*overrides)
    assert texts(recipe, "held_out") == ["a text of its own"]
    assert len(texts(recipe, "train")) == 24
    assert 500 <= sum(map(len, texts(make_recipe(*overrides, "data.train_bytes=500"), "train"))) < 700


def test_bpe_never_sees_what_is_held_out(make_recipe, tmp_path):
    # Each document repeats a word of its own, which would be among the first pieces if it were seen.
    words = [f"{letter}z" for letter in "abcdefghijklmnopqrstuvwx"]
    lines = [json.dumps({"text": " ".join([word] * 30)}) + "\n" for word in words]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    recipe = make_recipe("tokenizer=bpe:300", "data.held_out=150")
    held_out = {text[:2] for text in texts(recipe, "held_out")}
    vocabulary = recipe_tokenizer(recipe).get_vocab()
    assert len(held_out) == 2
    assert {word for word in words if word not in vocabulary} == held_out


def test_bytes_per_token(make_recipe):
    recipe = make_recipe()
    inputs = prepare_inputs(recipe)
    train = texts(recipe, "train")
    # Every byte is a token, and each document has an end as well.
    assert inputs.bytes_per_token == pytest.approx(sum(map(len, train)) / (sum(map(len, train)) + len(train)))
    assert inputs.vocab_size == 259


def test_the_saved_tokenizer_is_taken(make_recipe, tmp_path):
    recipe = make_recipe("tokenizer=bpe:300")
    load_tokenizer("byte").save_pretrained(tmp_path / "saved")
    assert prepare_inputs(recipe, saved_tokenizer=tmp_path / "saved").vocab_size == 259


def test_held_out_bytes_can_be_limited(make_recipe):
    few = prepare_inputs(make_recipe("evaluation.max_bytes=200")).held_out
    sizes = few.store.num_bytes[few.documents]
    assert 0 < sizes.sum() <= 200
    one = prepare_inputs(make_recipe("evaluation.max_bytes=1")).held_out
    every = prepare_inputs(make_recipe()).held_out
    assert every.store.num_bytes[one.documents].tolist() == [every.store.num_bytes[every.documents].min()]
    assert len(every.documents) > len(few.documents)


def test_mqar_batches(make_recipe):
    recipe = make_recipe(
        "tokenizer=null",
        "data={kind: mqar, vocab_size: 64, num_kv_pairs: 4, held_out: 5}",
        "batch={rows: 2, length: 32}",
    )
    inputs = prepare_inputs(recipe)
    batch = next(inputs.batches)
    assert batch.input_ids.shape == (2, 32)
    assert len(inputs.held_out._batches) == 3  # five rows, rounded up to whole batches
    assert not any(np.array_equal(batch.input_ids, held.input_ids) for held in inputs.held_out._batches)
    assert "row 0 begins [" in inputs.describe(batch)


def test_cache_folder(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(make_recipe().data) == tmp_path / "cache"
    assert str(cache_folder(make_recipe("data.cache_dir=null").data)) == "/somewhere/flash-gsa/tokens"
