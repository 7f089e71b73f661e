import errno
import json
import os
import time

import numpy as np
import pytest

from flash_gsa.data import encode_documents, iter_documents, load_tokenizer, preparation, prepare_tokens
from flash_gsa.data.store import MANIFEST, ArrayWriter, DamagedStore, TokenStore
from flash_gsa.errors import UsageError


def test_store_holds_every_document(store, corpus, byte_tokenizer):
    documents = list(iter_documents(str(corpus)))
    expected = encode_documents(byte_tokenizer, [d.text for d in documents])
    assert store.num_documents == len(documents) == 60
    assert store.num_tokens == sum(map(len, expected)) == store.offsets[-1]
    assert store.tokens.dtype == np.uint16
    assert store.sources == ["a", "b"]
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(store.document(i), expected[i])
        assert store.num_bytes[i] == len(document.text.encode()) == len(expected[i]) - 2
        assert store.label(i) == document.source


def test_second_time_from_the_cache(corpus, store, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_build", lambda *args: pytest.fail("built again"))
    again = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=store.folder.parent, verify=True)
    assert again.key == store.key
    np.testing.assert_array_equal(again.tokens, store.tokens)


def test_key_depends_on_source_tokenizer_and_limit(corpus, store, tmp_path, byte_tokenizer):
    keys = {store.key}
    tokenizer = load_tokenizer("bpe:300", training_texts=lambda: [corpus.read_text()] * 3)
    keys.add(prepare_tokens(str(corpus), tokenizer, cache_dir=tmp_path).key)
    keys.add(prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, max_bytes=10**9).key)
    other = tmp_path / "corpus.jsonl"
    other.write_text(corpus.read_text() + '{"text": "one more"}\n')
    keys.add(prepare_tokens(str(other), byte_tokenizer, cache_dir=tmp_path).key)
    assert len(keys) == 4


def test_max_bytes_stops_at_a_document(corpus, store, tmp_path, byte_tokenizer):
    limit = int(store.num_bytes[:10].sum())
    limited = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, max_bytes=limit)
    assert limited.num_documents == 10
    limited = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, max_bytes=limit + 1)
    assert limited.num_documents == 11
    with pytest.raises(UsageError, match="max_bytes is 0"):
        prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, max_bytes=0)


def test_progress_counts_up_to_everything(corpus, store, tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_DOCUMENTS_AT_ONCE", 25)
    calls = []
    prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, progress=lambda *done: calls.append(done))
    assert [documents for documents, _ in calls] == [25, 50, 60]
    assert calls[-1][1] == store.num_bytes.sum()


def test_interrupted_build_leaves_nothing(corpus, tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_DOCUMENTS_AT_ONCE", 25)

    def interrupt(documents, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_killed_build_is_not_taken_for_whole_and_cleared_after_a_day(corpus, store, tmp_path, byte_tokenizer):
    fresh, old = (tmp_path / f"{store.key}.building-{age}" for age in ("fresh", "old"))
    for folder in (fresh, old):
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old / "tokens.npy", old):
        os.utime(path, (two_days_ago, two_days_ago))
    assert prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path).num_documents == 60
    assert fresh.exists()
    assert not old.exists()


def test_source_that_fails_half_way_leaves_nothing(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_DOCUMENTS_AT_ONCE", 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UsageError, match="line 2"):
        prepare_tokens(str(tmp_path / "bad.jsonl"), byte_tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_builds_at_once_agree(corpus, tmp_path, byte_tokenizer):
    inner = []

    def build_too(documents, size):
        if not inner:
            inner.append(prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path))

    outer = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, progress=build_too)
    assert outer.folder == inner[0].folder
    np.testing.assert_array_equal(outer.tokens, inner[0].tokens)
    assert [path.name for path in tmp_path.iterdir()] == [outer.key]


def cut_tokens(folder):
    file = folder / "tokens.npy"
    os.truncate(file, file.stat().st_size - 1)


def edit_manifest(folder, **changes):
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        cut_tokens,
        lambda folder: (folder / "source.npy").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"format": 1, "key"'),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: edit_manifest(folder, format=999),
        lambda folder: edit_manifest(folder, files=None),
    ],
    ids=["cut", "array missing", "no manifest", "cut manifest", "list", "format", "no files"],
)
def test_damaged_store_is_built_again(damage, corpus, tmp_path, byte_tokenizer):
    whole = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path)
    expected = np.array(whole.tokens)
    damage(whole.folder)
    with pytest.raises(DamagedStore):
        TokenStore.open(whole.folder)
    with pytest.warns(UserWarning, match="is damaged .* building it again"):
        again = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.tokens, expected)
    TokenStore.open(again.folder, verify=True)


def test_changed_contents_are_found_by_verify(corpus, tmp_path, byte_tokenizer):
    whole = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path)
    with (whole.folder / "tokens.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    TokenStore.open(whole.folder)
    with pytest.warns(UserWarning, match=r"tokens\.npy does not have the sha256"):
        again = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, verify=True)
    TokenStore.open(again.folder, verify=True)


def test_full_disk(corpus, tmp_path, byte_tokenizer, monkeypatch):
    def no_space(self, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArrayWriter, "append", no_space)
    with pytest.raises(UsageError, match=r"no space left for the token cache in .*bytes free.*Free some space"):
        prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_dir_that_is_a_file(corpus, byte_tokenizer):
    with pytest.raises(UsageError, match=r"cannot be used.*can be written to"):
        prepare_tokens(str(corpus), byte_tokenizer, cache_dir=corpus)


def test_source_without_text(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UsageError, match="no document with any text"):
        prepare_tokens(str(tmp_path / "a.jsonl"), byte_tokenizer, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("pieces", [[], [[1, 2], [], [3]], [list(range(10**5))]])
def test_arrays_written_piece_by_piece(pieces, tmp_path):
    with ArrayWriter(tmp_path / "x.npy", np.uint32) as writer:
        for piece in pieces:
            writer.append(piece)
    array = np.load(tmp_path / "x.npy")
    assert array.dtype == np.uint32
    assert array.tolist() == [value for piece in pieces for value in piece]
