"""What a `data` section means: which documents are trained on, which are held out."""

import json

import numpy as np
import pytest

from flash_gsa.data import load_tokenizer
from flash_gsa.errors import UsageError
from flash_gsa.training.inputs import cache_folder, part_documents, prepare_inputs, recipe_tokenizer, text_parts
from flash_gsa.training.recipe_file import parse_recipe, recipe_to_yaml


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
    available = sum(map(len, texts(full, "train")))
    for size in (10_000_000, available, available - 1):
        assert texts(make_recipe(f"data.train_bytes={size}"), "train") == texts(full, "train")


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


def weighted(tmp_path, *overrides):
    """Overrides for two sources: the 24 documents of the recipe, and ten of another kind, three to one."""
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"{i}" * 90}) + "\n" for i in range(10)))
    first = f"{{source: {tmp_path}/text.jsonl, weight: 3}}"
    return f"data.source=[{first}, {{source: [{tmp_path}/other.jsonl], weight: 1, name: digits}}]", *overrides


def test_weighted_sources_are_trained_on_and_held_out_by_weight(make_recipe, tmp_path):
    recipe = make_recipe(*weighted(tmp_path))
    parts = text_parts(recipe, load_tokenizer("byte"))
    assert [part.weight for part in parts.train] == [3, 1]
    # Of the 400 bytes that are held out each source gives its share, up to the end of a document.
    held_out = texts(recipe, "held_out")
    digits = [text for text in held_out if text.isdigit()]
    assert sum(map(len, digits)) == 180
    assert 300 <= sum(len(text) for text in held_out if not text.isdigit()) < 450
    assert len(texts(recipe, "train")) + len(held_out) == 34
    documents = [parts.held_out_store.document(int(i)) for i in parts.held_out]
    assert [bytes(ids[1:-1].tolist()).decode() for ids in documents] == held_out
    labels = {parts.held_out_store.label(int(i)) for i in parts.held_out}
    assert labels == {document.source for document in part_documents(recipe, parts, "held_out")}
    assert labels == {"odd", "even", "digits"}


def test_a_share_is_held_out_of_each_source_and_byte_counts_are_divided(make_recipe, tmp_path):
    text = (tmp_path / "text.jsonl").read_text()
    recipe = make_recipe(*weighted(tmp_path, "data.held_out=0.15"))
    assert sum(map(str.isdigit, texts(recipe, "held_out"))) == 2
    small = make_recipe(*weighted(tmp_path, "data.train_bytes=400"))
    train = texts(small, "train")
    assert sum(len(t) for t in train if t.isdigit()) == 180
    assert 300 <= sum(len(t) for t in train if not t.isdigit()) < 450
    few = make_recipe(*weighted(tmp_path, "data.max_bytes=1200", "data.held_out=100"))
    everything = texts(few, "train") + texts(few, "held_out")
    assert sum(t.isdigit() for t in everything) == 4  # 360 bytes: the document with which 300 are reached
    assert len(everything) < 4 + text.count("\n")


def test_a_source_with_too_little_is_named(make_recipe, tmp_path):
    recipe = make_recipe(*weighted(tmp_path, "data.held_out=4000"))
    with pytest.raises(
        UsageError, match=r"The source .*text\.jsonl .* by weight\): data\.held_out=3000 leaves no document"
    ):
        text_parts(recipe, load_tokenizer("byte"))


def test_batches_and_bytes_per_token_of_weighted_sources(make_recipe, tmp_path):
    inputs = prepare_inputs(make_recipe(*weighted(tmp_path, "batch={rows: 40, length: 8}")))
    batch = inputs.batches.batch(3)
    rows = batch.input_ids.reshape(40, 8)
    digits = ((rows >= 48) & (rows < 58)).any(1)
    assert digits.sum() == 10
    # Rows of digits score 90 bytes in 91 of their 92 tokens; the others as many bytes as tokens, but for the ends.
    first, second = inputs.batches.parts
    size, tokens = first.store.sizes(first.documents).sum(), first.store.lengths(first.documents).sum()
    scored = 3 * (tokens - len(first.documents)) / tokens + 91 / 92
    assert inputs.bytes_per_token == pytest.approx((3 * size / tokens + 90 / 92) / scored)
    assert len(second.documents) == 8


def test_all_documents_take_no_index(make_recipe, tmp_path):
    (tmp_path / "valid.txt").write_text("a text of its own")
    recipe = make_recipe("data.held_out=null", f"data.valid_source={tmp_path}/valid.txt")
    (part,) = text_parts(recipe, load_tokenizer("byte")).train
    assert part.documents is None


def test_holding_everything_out_is_refused_with_the_key(make_recipe):
    with pytest.raises(UsageError, match=r"^data\.held_out=0\.9999999 leaves no document to train on"):
        text_parts(make_recipe("data.held_out=0.9999999"), load_tokenizer("byte"))


def test_verify_compares_checksums_of_what_has_changed_of_all_or_of_nothing(make_recipe, tmp_path):
    prepare_inputs(make_recipe())
    (shard,) = tmp_path.glob("cache/*/*.arrow")
    contents = bytearray(shard.read_bytes())
    contents[-100] ^= 1
    shard.write_bytes(contents)
    prepare_inputs(make_recipe("data.verify=false"))
    for overrides in ([], ["data.verify=once"], ["data.verify=true"]):
        with pytest.raises(UsageError, match="its sha256 is"):
            prepare_inputs(make_recipe(*overrides))


@pytest.mark.parametrize("value", ["always", "1", "null"])
def test_other_values_of_verify_are_refused(value, make_recipe):
    with pytest.raises(UsageError, match=r"data\.verify: expected 'once' or true or false, got"):
        make_recipe(f"data.verify={value}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("[{source: a, wieght: 1}]", r"data\.source\.0\.weight is missing"),
        ("[{source: a, wieght: 1}]", r"unknown key data\.source\.0\.wieght"),
        ("[{source: a, weight: 0}]", r"data\.source\.0\.weight: expected greater than 0, got 0"),
        ("[{source: a, weight: 1}, b]", r"data\.source\.1: expected a section of keys, got 'b' \(text\)"),
        ("{source: a, weight: 1}", r"data\.source: expected text or a list"),
    ],
)
def test_weighted_sources_that_are_wrong(source, message, make_recipe):
    with pytest.raises(UsageError, match=message):
        make_recipe(f"data.source={source}")


def test_a_recipe_with_weighted_sources_is_written_and_read(make_recipe, tmp_path):
    recipe = make_recipe(*weighted(tmp_path))
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe


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
    sizes = few.store.sizes(few.documents)
    assert 0 < sizes.sum() <= 200
    one = prepare_inputs(make_recipe("evaluation.max_bytes=1")).held_out
    every = prepare_inputs(make_recipe()).held_out
    assert every.store.sizes(one.documents).tolist() == [every.store.sizes(every.documents).min()]
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
