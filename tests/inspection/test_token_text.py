import pytest

from flash_gsa.data import encode_documents, load_tokenizer
from flash_gsa.inspection import IncrementalText, token_texts

TEXTS = ["def f():\n\treturn  1", "Grüße, 漢字 and 🐚🐚", " leading space", "", "naïve"]


def tokenizers():
    yield load_tokenizer("byte")
    yield load_tokenizer(
        "bpe:300", training_texts=lambda: ["return the naïve text " * 20, "".join(map(chr, range(32, 500)))]
    )
    try:
        yield load_tokenizer("mistral")
    except ValueError:
        return


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda t: f"{len(t)} tokens")
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(tokenizer, text):
    ids = encode_documents(tokenizer, [text])[0].tolist()
    plain = IncrementalText(tokenizer, skip_special_tokens=True)
    assert "".join(plain.push(i) for i in ids) + plain.finish() == text
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == tokenizer.bos_token
    assert pieces[-1] == tokenizer.eos_token


def test_a_character_comes_with_its_last_byte():
    tokenizer = load_tokenizer("byte")
    assert token_texts(tokenizer, list("aü漢".encode())) == ["a", "", "ü", "", "", "漢"]


def test_what_stays_unfinished_is_marked():
    tokenizer = load_tokenizer("byte")
    assert token_texts(tokenizer, [97, 0xE6, 0xBC]) == ["a", "", "\ufffd"]
    assert "".join(token_texts(tokenizer, [0xFF, 97, 98])) == "\ufffdab"


def test_text_goes_on_after_a_finished_one():
    tokenizer = load_tokenizer("mistral")
    prompt = tokenizer("The sea is", add_special_tokens=False)["input_ids"]
    whole = tokenizer("The sea is a plain", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt
    text = IncrementalText(tokenizer, skip_special_tokens=True)
    assert "".join(text.push(i) for i in prompt) + text.finish() == "The sea is"
    # The space is part of the next piece, but a decoder strips it from the start of what it is given.
    assert "".join(text.push(i) for i in whole[len(prompt) :]) == " a plain"
