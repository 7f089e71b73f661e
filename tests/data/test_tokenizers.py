import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flash_gsa.data import encode_documents, iter_documents, load_tokenizer
from flash_gsa.data.encoding import tokenizer_fingerprint
from flash_gsa.errors import UsageError

TEXTS = [
    "",
    " ",
    "Hello  world\n",
    "\tdef f(x):\r\n    return x",
    "naïve 漢字 🙂\u200b",
    "<s></s><unk><bos><eos><pad>",
    "\0\x7f",
]
BYTE = load_tokenizer("byte")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def training_texts():
    return (document.text for document, _ in zip(iter_documents("stdlib"), range(20), strict=False))


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("bpe:600", training_texts=training_texts)


@given(any_text)
@settings(deadline=None)
def test_byte_ids_are_the_bytes(text):
    ids = BYTE(text, add_special_tokens=False).input_ids
    assert ids == list(text.encode())
    assert BYTE.decode(ids) == text


def test_byte_special_tokens(byte_tokenizer):
    assert len(byte_tokenizer) == 259
    assert [byte_tokenizer.convert_tokens_to_ids(t) for t in ("<bos>", "<eos>", "<pad>")] == [256, 257, 258]
    assert byte_tokenizer("A").input_ids == [256, 65]
    assert byte_tokenizer.pad(byte_tokenizer(["A", ""])).input_ids == [[256, 65], [256, 258]]


def test_bpe_is_lossless_and_of_the_size_asked_for(bpe):
    assert len(bpe) == 600
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (0, 1, 2)

    @given(any_text)
    @settings(deadline=None)
    def lossless(text):
        assert bpe.decode(bpe(text).input_ids, skip_special_tokens=True) == text

    lossless()


def test_special_tokens_in_text_are_text(bpe):
    for tokenizer in (BYTE, bpe):
        text = "<bos>a<eos><pad>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert set(ids).isdisjoint(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == text


def test_bpe_covers_more_bytes_a_token_than_bytes_do(bpe):
    text = "import collections\n\n\nclass Example:\n    def method(self, value):\n        return value\n"
    assert len(bpe(text).input_ids) < len(text.encode()) / 2


def test_bpe_depends_only_on_its_texts(bpe):
    again = load_tokenizer("bpe:600", training_texts=training_texts)
    assert again.get_vocab() == bpe.get_vocab()
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(bpe)


@pytest.mark.parametrize("spec", ["byte", "bpe:600", "mistral"])
def test_saved_and_loaded_gives_the_same_ids(spec, bpe, tmp_path):
    tokenizer = bpe if spec == "bpe:600" else load_tokenizer(spec)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(TEXTS).input_ids == tokenizer(TEXTS).input_ids
        assert [loaded.decode(ids) for ids in loaded(TEXTS).input_ids] == [
            tokenizer.decode(ids) for ids in tokenizer(TEXTS).input_ids
        ]
        assert loaded.pad_token_id == tokenizer.pad_token_id
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
        for ours, theirs in zip(encode_documents(tokenizer, TEXTS), encode_documents(loaded, TEXTS), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_fingerprint_ignores_what_calls_leave_behind(byte_tokenizer):
    before = tokenizer_fingerprint(byte_tokenizer)
    byte_tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(byte_tokenizer) == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bytes", "Did you mean 'byte'"),
        ("mistrall", "Did you mean 'mistral'"),
        ("somewhere/tokenizer", r"no tokenizer and no folder.*byte, bpe:N, mistral"),
        ("bpe", "for instance 'bpe:4096'"),
        ("bpe:many", "for instance 'bpe:4096'"),
        ("bpe:299", "from 300 to 65536"),
        ("bpe:65537", "from 300 to 65536"),
        ("bpe:4096", "trained on the training texts, and there are none"),
    ],
)
def test_refused_specs(spec, message):
    with pytest.raises(UsageError, match=message):
        load_tokenizer(spec)


def test_refuses_too_little_text_for_bpe():
    with pytest.raises(UsageError, match=r"give only .* pieces"):
        load_tokenizer("bpe:5000", training_texts=lambda: ["a few words"])


def test_refuses_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_refuses_a_broken_tokenizer_file(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:200])
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
