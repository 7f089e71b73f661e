import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash_gsa.data import encode_documents, encoding, load_tokenizer

LONG = " ".join(f"word{i}  and\n         more {i * i} é漢▁ x" for i in range(300))


@pytest.fixture(scope="module", params=["byte", "mistral", "bpe:400"])
def tokenizer(request):
    return load_tokenizer(request.param, training_texts=lambda: [LONG, "def f(x): return x"])


def test_document_is_bos_tokens_eos(tokenizer):
    for text, ids in zip(["", "Hi there"], encode_documents(tokenizer, ["", "Hi there"]), strict=True):
        inside = tokenizer(text, add_special_tokens=False).input_ids
        assert ids.tolist() == [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
        assert ids.dtype == np.uint16


def test_special_tokens_in_text_are_text(tokenizer, monkeypatch):
    text = f"a{tokenizer.bos_token} {tokenizer.eos_token}{tokenizer.pad_token}"
    # Also where the tokenizer was told to see them, as Hugging Face tokenizers do unless told otherwise.
    monkeypatch.setattr(tokenizer, "split_special_tokens", False)
    (ids,) = encode_documents(tokenizer, [text])
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert specials.isdisjoint(ids[1:-1].tolist())
    assert tokenizer.decode(ids[1:-1]) == text


def test_padding_and_truncation_of_the_tokenizer_have_no_effect(tokenizer):
    tokenizer(["a", "much longer"], padding=True, truncation=True, max_length=2)
    short, long = encode_documents(tokenizer, ["a", LONG])
    assert len(short) < 10
    assert len(long) > 1000


@pytest.mark.parametrize("size", [1, 7, 40])
def test_long_documents_cut_in_pieces_have_the_same_ids(size, tokenizer, monkeypatch):
    (whole,) = encode_documents(tokenizer, [LONG])
    cuts = []
    cut = encoding.DocumentEncoder._cut
    monkeypatch.setattr(
        encoding.DocumentEncoder, "_cut", lambda self, text: cuts.append(list(cut(self, text))) or cuts[-1]
    )
    monkeypatch.setattr(encoding, "_PIECE_CHARACTERS", size)
    monkeypatch.setattr(encoding, "_CALL_CHARACTERS", 100)
    before, pieces, after = encode_documents(tokenizer, ["before", LONG, "after"])
    np.testing.assert_array_equal(pieces, whole)
    assert len(cuts[1]) > len(LONG) / (size + 100)
    assert tokenizer.decode(before[1:-1]) == "before"
    assert tokenizer.decode(after[1:-1]) == "after"


def test_text_without_a_space_stays_whole(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_PIECE_CHARACTERS", 7)
    (ids,) = encode_documents(byte_tokenizer, ["漢" * 100])
    assert bytes(ids[1:-1].tolist()).decode() == "漢" * 100


def test_bos_and_eos_are_left_out_where_there_are_none():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [ids.tolist() for ids in encode_documents(tokenizer, ["a b", "b"])] == [[0, 1], [1]]


def test_large_vocabularies_take_four_bytes():
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (ids,) = encode_documents(tokenizer, ["w69999"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [69_999]
