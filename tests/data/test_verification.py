"""Shards are read and compared with the manifest once, and again when they have changed."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flash_gsa.data import PackedBatches, Part, iter_whole_documents, preparation, prepare_tokens, verification
from flash_gsa.data.verification import VERIFIED
from flash_gsa.errors import UsageError


@pytest.fixture
def build(corpus, byte_tokenizer, tmp_path, monkeypatch):
    """Opens a store of some ten shards, and builds it at the first call."""
    monkeypatch.setattr(preparation, "_SHARD_BYTES", 900)
    monkeypatch.setattr(preparation, "_PIECE_BYTES", 300)
    return lambda **options: prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the shards that are read to be verified, as they are."""
    names: list[str] = []
    sha256_of = verification.sha256_of
    monkeypatch.setattr(verification, "sha256_of", lambda file: (names.append(file.name), sha256_of(file))[1])
    return names


def names(store) -> list[str]:
    return [shard.path.name for shard in store.shards]


def touch(file):
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def overwrite(file, what: bytes, by: bytes):
    contents = file.read_bytes()
    assert contents.count(what) == 1
    file.write_bytes(contents.replace(what, by))
    touch(file)  # clocks of files are coarse: it could have the time it had


def test_what_this_call_writes_is_not_read(build, read):
    for verify in ("once", True):
        store = build(verify=verify, max_bytes=10**6 + (verify == "once"))
        assert len(store.shards) > 5
        assert read == []


def test_each_shard_is_read_once(build, read):
    store = build()
    (store.folder / VERIFIED).unlink()  # as of a store that was copied here, or is of an older version
    build()
    assert sorted(read) == names(store)
    build()
    assert len(read) == len(store.shards)


def test_what_was_touched_is_read_again_alone(build, read):
    folder = build().folder
    touch(folder / "shard-00002.arrow")
    build()
    build()
    assert read == ["shard-00002.arrow"]


def test_all_or_nothing(build, read):
    store = build()
    for _ in range(2):
        build(verify=True)
        assert sorted(read) == names(store)
        read.clear()
    (store.folder / VERIFIED).unlink()
    build(verify=False)
    assert read == []
    with pytest.raises(UsageError, match="verify is 'always', expected 'once', True or False"):
        build(verify="always")


def test_every_damaged_shard_is_named_and_the_others_are_not_read_again(build, read):
    store = build()
    (store.folder / VERIFIED).unlink()
    for number in (1, 4):
        first = store.shards[number].tokens[:20].tobytes()
        overwrite(store.folder / f"shard-{number:05d}.arrow", first, bytes([first[0] ^ 1]) + first[1:])
    message = r"shard-00001\.arrow is damaged: its sha256 is.*\n.*shard-00004\.arrow is damaged: its sha256 is"
    for expected in (names(store), ["shard-00001.arrow", "shard-00004.arrow"]):
        with pytest.raises(UsageError, match=message):
            build()
        assert sorted(read) == expected
        read.clear()


@pytest.mark.parametrize("text", ["", "[]", '{"shard-00000.arrow": 3}', '{"shard-00000.arrow": [1, 2, 3, "x"]}'])
def test_a_record_that_cannot_be_read_is_made_again(text, build, read):
    store = build()
    (store.folder / VERIFIED).write_text(text)
    build()
    assert sorted(read) == names(store)
    assert sorted(json.loads((store.folder / VERIFIED).read_text())) == names(store)


@pytest.mark.parametrize("verify", ["once", True])
def test_of_several_processes_one_reads_and_all_refuse(verify, build, read, monkeypatch):
    store = build()
    (store.folder / VERIFIED).unlink()
    counting = verification.sha256_of

    def slow(file):
        time.sleep(0.02)
        return counting(file)

    monkeypatch.setattr(verification, "sha256_of", slow)
    with ThreadPoolExecutor(4) as pool:  # the lock is one between open files, so threads stand for processes
        for future in [pool.submit(build, verify=verify) for _ in range(4)]:
            future.result()
        assert sorted(read) == names(store)
        touch(store.folder / "shard-00000.arrow")
        first = store.shards[3].tokens[:20].tobytes()
        overwrite(store.folder / "shard-00003.arrow", first, b"\xff" + first[1:])
        for future in [pool.submit(build, verify=verify) for _ in range(4)]:
            with pytest.raises(UsageError, match=r"shard-00003\.arrow is damaged: its sha256 is"):
                future.result()
    assert read.count("shard-00000.arrow") == 2


def test_a_folder_that_cannot_be_written_to(build, read, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    store = build()
    (store.folder / VERIFIED).unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != store.folder and access(path, mode))
    for _ in range(2):
        build()
        assert sorted(read) == names(store)
    assert not (store.folder / VERIFIED).exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    build()
    assert sorted(read) == sorted(names(store) * 2)


def test_a_shard_that_cannot_be_read(build, monkeypatch):
    store = build()

    def failing(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verification, "sha256_of", failing)
    with pytest.raises(UsageError, match=r"shard-00000\.arrow cannot be read: Input/output error"):
        build(verify=True)
    assert names(store)


def test_progress_counts_up_to_all_bytes(build):
    store = build()
    calls = []
    build(verify=True, verifying=lambda *figures: calls.append(figures))
    size = sum(shard.path.stat().st_size for shard in store.shards)
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)


def test_ids_outside_of_the_vocabulary_are_refused_with_the_shard(build):
    store = build()
    some = store.shards[2].tokens[:20]
    overwrite(store.folder / "shard-00002.arrow", some.tobytes(), b"\xff" * some.nbytes)
    store = build(verify=False)
    message = r"shard-00002\.arrow is damaged: it holds token id 65535, and the vocabulary has 259 ids.*data\.verify"
    batches = PackedBatches(Part(store), length=32, rows=store.num_tokens // 32 + 1, seed=0)
    with pytest.raises(UsageError, match=message):
        batches.batch(0)
    with pytest.raises(UsageError, match=message):
        list(iter_whole_documents(store, np.arange(store.num_documents), 10_000))
    joined = type(store).joined([store, store.labelled("x")])
    assert joined.vocab_size == 259
