"""The converted vocabulary against sentencepiece itself."""

import random
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data import iter_documents, load_tokenizer
from flash_gsa.data.mistral import SPACE, merge_rules, mistral_model_path
from flash_gsa.data.sentencepiece_model import PieceType, read_sentencepiece_model
from flash_gsa.errors import UsageError

TOKENIZER = load_tokenizer("mistral")
JUDGE = sentencepiece.SentencePieceProcessor(str(mistral_model_path()))
MODEL = read_sentencepiece_model(mistral_model_path())
NORMAL = {piece.text for piece in MODEL.pieces if piece.type == PieceType.NORMAL}

# Look-alikes of special and byte pieces, every kind of blank, scripts with and without pieces of their own.
FRAGMENTS = [
    *("<s>", "</s>", "<unk>", "<0x0A>", SPACE, " ", "  ", "   ", "\n", "\t", "\r\n", "\0", "\x7f", "\u00a0", "\u3000"),
    *("é", "e\u0301", "漢字", "かな", "ا", "ह", "🙂", "👩‍👧", "\u200b", "\ufeff", "\u202e", "ﬁ", "ß", "\U0010ffff"),
    *("the", " the", "ing", "def f(x):\n    return x", "==", "....", "0", "12", '"""', "']['"),
]


def assert_equal_to_sentencepiece(texts):
    expected = JUDGE.encode(texts, num_threads=2)
    encoded = TOKENIZER.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, expected, encoded, strict=True):
        assert encoding.ids == ids, text[:200]
    assert TOKENIZER.batch_decode(expected) == JUDGE.decode(expected)


def test_model_file_is_read_as_sentencepiece_reads_it():
    assert [p.text for p in MODEL.pieces] == [JUDGE.id_to_piece(i) for i in range(32_000)]
    assert [p.score for p in MODEL.pieces] == [JUDGE.get_score(i) for i in range(32_000)]
    assert [p.type == PieceType.BYTE for p in MODEL.pieces] == [JUDGE.is_byte(i) for i in range(32_000)]
    assert [p.type == PieceType.CONTROL for p in MODEL.pieces] == [JUDGE.is_control(i) for i in range(32_000)]


def test_known_ids():
    assert TOKENIZER("Hello world").input_ids == [1, 22557, 1526]
    assert TOKENIZER("").input_ids == [1]
    assert len(TOKENIZER) == 32_000
    ids = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id, TOKENIZER.pad_token_id)
    assert ids == (1, 2, 0, 0)


def test_words_may_be_cut_before_their_spaces():
    crossing = [p for p in NORMAL if any(a != SPACE and b == SPACE for a, b in pairwise(p))]
    assert crossing == []


def test_overlapping_splits_of_one_piece_rank_from_the_left():
    rank = {pair: i for i, pair in enumerate(merge_rules(MODEL))}
    checked = 0
    for piece in NORMAL:
        for cut in range(1, len(piece)):
            x, y = piece[:cut], piece[cut:]
            z = piece[len(y) :]
            if {x, y, z} <= NORMAL and piece == y + z and x != z:
                assert len(x) > len(y)
                assert rank[x, y] < rank[y, z]
                checked += 1
    assert checked > 100


def test_equal_on_runs_of_every_repeated_character():
    runs = sorted({p[0].replace(SPACE, " ") for p in NORMAL if len(p) > 1 and len(set(p)) == 1})
    around = [("", ""), (" ", "b"), ("a", "-"), ("ab ", "")]
    assert_equal_to_sentencepiece(
        [before + c * n + after for c in runs for n in range(1, 70) for before, after in around]
    )


def test_equal_on_mixtures_of_awkward_fragments():
    rng = random.Random(0)
    assert_equal_to_sentencepiece(["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12))) for _ in range(5000)])


def test_equal_on_mixtures_of_pieces():
    rng = random.Random(1)
    pieces = sorted(piece.replace(SPACE, " ") for piece in NORMAL)
    assert_equal_to_sentencepiece(["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(5000)])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None)
def test_equal_on_any_text(text):
    assert TOKENIZER(text, add_special_tokens=False).input_ids == JUDGE.encode(text)


def test_equal_on_a_megabyte_in_one_piece():
    text = ""
    for document in iter_documents("stdlib"):
        text += document.text
        if len(text) > 1_000_000:
            break
    assert_equal_to_sentencepiece([text])


def test_missing_package_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "flash-gsa\[mistral\]"'):
        load_tokenizer("mistral")


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x0a", b"\x0b"], ids=["short field", "no size", "wire type"])
def test_broken_model_files_are_refused(data, tmp_path):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(ValueError, match="protocol buffer"):
        read_sentencepiece_model(tmp_path / "x.model")
