"""Building, finding, resuming and refusing token stores."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flash_gsa.data import encode_documents, iter_documents, load_tokenizer, preparation, prepare_tokens, tokenizing
from flash_gsa.data.manifest import UNFINISHED, WHOLE
from flash_gsa.data.shards import sha256_of
from flash_gsa.data.store import TokenStore
from flash_gsa.data.verification import VERIFIED
from flash_gsa.errors import UsageError


@pytest.fixture
def small_shards(monkeypatch):
    """A corpus of about 9 KB becomes some ten shards of a few pieces each."""
    monkeypatch.setattr(preparation, "_SHARD_BYTES", 900)
    monkeypatch.setattr(preparation, "_PIECE_BYTES", 300)
    monkeypatch.setattr(tokenizing, "_WORTH_PROCESSES", 0)


@pytest.fixture
def build(corpus, byte_tokenizer, tmp_path):
    return lambda **options: prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, **options)


def contents(store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.folder.iterdir()) if p.name not in ("lock", VERIFIED)}


def all_tokens(store) -> np.ndarray:
    return np.concatenate([store.document(i) for i in range(store.num_documents)])


def check(store, corpus, tokenizer):
    documents = list(iter_documents(str(corpus)))
    expected = encode_documents(tokenizer, [d.text for d in documents])
    lengths = [len(ids) for ids in expected]
    assert store.num_documents == len(documents) == 60
    assert store.num_tokens == sum(lengths)
    assert store.lengths().tolist() == lengths
    assert store.starts().tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert store.sizes().tolist() == [len(d.text.encode()) for d in documents]
    assert store.num_bytes == store.sizes().sum()
    some = np.array([31, 2, 59, 2])
    for values in (store.lengths, store.starts, store.sizes, store.digests):
        assert values(some).tolist() == values()[some].tolist()
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(store.document(i), expected[i])
        assert store.label(i) == document.source


def test_store_holds_every_document(store, corpus, byte_tokenizer):
    check(store, corpus, byte_tokenizer)
    assert store.document(0).dtype == np.uint16


def test_shards_are_maps_of_files_that_datasets_reads_too(small_shards, build, corpus, byte_tokenizer):
    import datasets

    store = build()
    check(store, corpus, byte_tokenizer)
    assert len(store.shards) > 5
    for shard in store.shards:
        for array in (shard.tokens, shard.offsets, shard.num_bytes, shard.source, shard.digest):
            assert not array.flags.owndata
            assert not array.flags.writeable
    first = datasets.Dataset.from_file(str(store.folder / "shard-00000.arrow"))
    assert first[0]["tokens"] == store.document(0).tolist()
    assert first["num_bytes"][:] == store.sizes()[: len(first)].tolist()


def test_open_files_do_not_grow_with_shards(small_shards, build):
    before = len(os.listdir("/proc/self/fd"))
    store = build()
    assert len(store.shards) > 5
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_same_bytes_for_any_number_of_processes(small_shards, corpus, byte_tokenizer, tmp_path):
    stores = [prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path / str(n), processes=n) for n in (1, 2, 3)]
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])


def test_little_text_starts_no_processes(build, monkeypatch):
    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", lambda *args: pytest.fail("a pool was started"))
    assert build(processes=4).num_documents == 60


def test_processes_that_do_not_start(small_shards, build, monkeypatch):
    monkeypatch.setattr(tokenizing, "_begin", int)  # which refuses its argument
    with pytest.raises(UsageError, match="2 processes that tokenise could not start or was killed"):
        build(processes=2)


def test_second_time_from_the_cache(corpus, store, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation._Build, "run", lambda *args: pytest.fail("built again"))
    again = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=store.folder.parent, verify=True)
    assert again.key == store.key
    np.testing.assert_array_equal(all_tokens(again), all_tokens(store))


def test_key_depends_on_source_tokenizer_and_limit(corpus, store, tmp_path, byte_tokenizer):
    keys = {store.key}
    tokenizer = load_tokenizer("bpe:300", training_texts=lambda: [corpus.read_text()] * 3)
    keys.add(prepare_tokens(str(corpus), tokenizer, cache_dir=tmp_path).key)
    keys.add(prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path, max_bytes=10**9).key)
    other = tmp_path / "corpus.jsonl"
    other.write_text(corpus.read_text() + '{"text": "one more"}\n')
    keys.add(prepare_tokens(str(other), byte_tokenizer, cache_dir=tmp_path).key)
    assert len(keys) == 4


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_max_bytes_stops_at_a_document(shard_bytes, store, build, monkeypatch):
    monkeypatch.setattr(preparation, "_SHARD_BYTES", shard_bytes)
    limit = int(store.sizes()[:10].sum())
    assert build(max_bytes=limit).num_documents == 10
    assert build(max_bytes=limit + 1).num_documents == 11


@pytest.mark.parametrize("name", ["max_bytes", "processes"])
def test_numbers_that_make_no_sense(name, build):
    with pytest.raises(UsageError, match=f"{name} is 0"):
        build(**{name: 0})


def test_progress_counts_up_to_everything(small_shards, build):
    calls = []
    store = build(processes=1, progress=lambda *done: calls.append(done))
    assert len(calls) > 20
    assert calls == sorted(calls)
    assert calls[-1] == (60, store.num_bytes)


def interrupt_after(pieces):
    calls = []

    def progress(documents, size):
        calls.append(documents)
        if len(calls) > pieces:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_build_goes_on_behind_its_last_whole_shard(small_shards, build, corpus, tmp_path, monkeypatch):
    expected = contents(build())
    cache = tmp_path / "interrupted"
    tokenizer = load_tokenizer("byte")
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(str(corpus), tokenizer, cache_dir=cache, processes=1, progress=interrupt_after(12))
    (folder,) = cache.iterdir()
    there = {p.name for p in folder.glob("shard-*")}
    assert 1 < len(there) < len(expected) - 1
    assert not (folder / WHOLE).exists()
    with pytest.raises(UsageError, match="no whole token store"):
        TokenStore.open(folder)
    made = []
    write = preparation.write_shard
    monkeypatch.setattr(preparation, "write_shard", lambda path, *args: (made.append(path.name), write(path, *args)))
    counts = []
    store = prepare_tokens(
        str(corpus), tokenizer, cache_dir=cache, processes=1, progress=lambda *done: counts.append(done)
    )
    assert contents(store) == expected
    assert set(made) == {name for name in expected if name.startswith("shard")} - there
    assert counts[-1] == (60, store.num_bytes)


def test_parts_of_the_source_that_are_done_are_not_read_again(small_shards, tmp_path, byte_tokenizer):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 300)
    files = str(tmp_path / "?.txt")
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(files, byte_tokenizer, cache_dir=tmp_path / "c", processes=1, progress=interrupt_after(5))
    (folder,) = (tmp_path / "c").iterdir()
    done = json.loads((folder / UNFINISHED).read_text())["shards"][-1]["end"][0]
    assert done >= 2
    opened = []
    sources = preparation.open_sources(files)
    parts = [
        lambda part=part, i=i: (opened.append(i), part())[1]
        for i, part in enumerate(part for source in sources for part in source.parts())
    ]
    build = preparation._Build(
        folder,
        preparation.read_manifest(folder / UNFINISHED).contents,
        tokenizing.DocumentEncoder.of(byte_tokenizer),
        None,
    )
    build.run(parts, 1)
    assert opened == list(range(done, 8))
    assert TokenStore.open(folder, verify=True).num_documents == 8


SCRIPT = """
import sys, time
from flash_gsa.data import load_tokenizer, preparation, prepare_tokens, tokenizing
preparation._SHARD_BYTES, preparation._PIECE_BYTES, tokenizing._WORTH_PROCESSES = 900, 300, 0
prepare_tokens(sys.argv[1], load_tokenizer("byte"), cache_dir=sys.argv[2], processes=2,
               progress=lambda *done: time.sleep(0.1))
"""


def children(pid) -> list[int]:
    """Of a process, and theirs."""
    direct = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*direct, *(grandchild for child in direct for grandchild in children(child))]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
def test_a_killed_build_leaves_no_processes_and_goes_on(small_shards, build, corpus, byte_tokenizer, tmp_path):
    expected = contents(build())
    cache = tmp_path / "killed"
    victim = subprocess.Popen([sys.executable, "-c", SCRIPT, str(corpus), str(cache)])
    deadline = time.monotonic() + 100
    while len(list(cache.glob("*/shard-*.arrow"))) < 3:
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = children(victim.pid)
    assert len(processes) >= 3
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (folder,) = cache.iterdir()
    recorded = [shard["file"] for shard in json.loads((folder / UNFINISHED).read_text())["shards"]]
    there = {name: (folder / name).stat().st_mtime_ns for name in recorded}
    assert 1 < len(there) < len(expected) - 1
    store = prepare_tokens(str(corpus), byte_tokenizer, cache_dir=cache)
    assert contents(store) == expected
    assert {name: (store.folder / name).stat().st_mtime_ns for name in there} == there
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in status(pid) for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(pid) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_of_several_that_ask_at_once_one_builds_and_the_others_wait(small_shards, build, monkeypatch):
    builds = []
    run = preparation._Build.run

    def slow(*args):
        builds.append(args)
        time.sleep(0.2)
        run(*args)

    monkeypatch.setattr(preparation._Build, "run", slow)
    with ThreadPoolExecutor(4) as pool:  # the lock is one between open files, so threads stand for processes
        stores = [future.result() for future in [pool.submit(build, processes=1) for _ in range(4)]]
    assert len(builds) == 1
    assert {store.num_documents for store in stores} == {60}


def test_source_that_fails_half_way(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_SHARD_BYTES", 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UsageError, match="line 2"):
        prepare_tokens(str(tmp_path / "bad.jsonl"), byte_tokenizer, cache_dir=tmp_path / "cache", processes=1)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / WHOLE).exists()


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    with file.open("r+b") as handle:
        handle.seek(-100, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-100, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))


def test_a_cut_shard_is_refused_by_name(small_shards, build):
    shard = build().folder / "shard-00003.arrow"
    cut(shard)
    size = shard.stat().st_size
    with pytest.raises(
        UsageError,
        match=rf"shard-00003\.arrow is damaged: it has {size:,} bytes.*expects {size + 1:,}.*Delete this shard",
    ):
        build()


@pytest.mark.parametrize("options", [{}, {"verify": "once"}, {"verify": True}])
def test_a_changed_shard_is_found_by_verify_with_both_checksums(options, small_shards, build):
    shard = build().folder / "shard-00003.arrow"
    expected = sha256_of(shard)
    flip(shard)
    build(verify=False)  # sizes are right
    with pytest.raises(
        UsageError, match=rf"shard-00003\.arrow is damaged: its sha256 is {sha256_of(shard)}.*{expected}"
    ):
        build(**options)


@pytest.mark.parametrize("numbers", [[0], [3], [1, 2, 5], [-1]])
def test_a_deleted_shard_is_built_again_alone(numbers, small_shards, build, monkeypatch):
    store = build()
    expected = contents(store)
    names = [f"shard-{range(len(store.shards))[n]:05d}.arrow" for n in numbers]
    for name in names:
        (store.folder / name).unlink()
    with pytest.raises(UsageError, match=f"{names[0]} is missing"):
        TokenStore.open(store.folder)
    made = []
    write = preparation.write_shard
    monkeypatch.setattr(preparation, "write_shard", lambda path, *args: (made.append(path.name), write(path, *args)))
    assert contents(build()) == expected
    assert made == names


def test_a_shard_that_cannot_be_built_again_as_it_was(small_shards, build):
    store = build()
    manifest = store.folder / WHOLE
    values = json.loads(manifest.read_text())
    found = values["shards"][2]["sha256"]
    values["shards"][2]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(values))
    (store.folder / "shard-00002.arrow").unlink()
    with pytest.raises(UsageError, match=rf"shard-00002\.arrow was built again.*is {found}.*expects {'0' * 64}"):
        build()
    assert not (store.folder / "shard-00002.arrow").exists()


def edit(**changes):
    def damage(folder):
        file = folder / WHOLE
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def swap(folder):
    a, b, aside = (folder / name for name in ("shard-00001.arrow", "shard-00002.arrow", "aside"))
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    file = folder / WHOLE
    values = json.loads(file.read_text())
    shards = values["shards"]
    shards[1]["size"], shards[2]["size"] = shards[2]["size"], shards[1]["size"]
    file.write_text(json.dumps(values))


def miscount(folder):
    file = folder / WHOLE
    values = json.loads(file.read_text())
    values["shards"][0]["documents"] += 1
    file.write_text(json.dumps(values))


def not_arrow(folder):
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)


def flip_at(offset):
    def damage(folder):
        shard = folder / "shard-00000.arrow"
        contents = bytearray(shard.read_bytes())
        contents[offset] ^= 0xFF
        shard.write_bytes(contents)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WHOLE).write_text('{"format": 2, "key"'), "is not a manifest of tokens"),
        (lambda folder: (folder / WHOLE).write_text("[]"), "is not a manifest of tokens"),
        (edit(shards=None), "is not a manifest of tokens"),
        (edit(format=999), "its format is 999, expected 2"),
        (edit(tokenizer="f" * 64), f"its tokenizer is {'f' * 64}, expected [0-9a-f]{{64}}"),
        (edit(source="f" * 64), f"its source is {'f' * 64}, expected [0-9a-f]{{64}}"),
        (swap, r"shard-00001\.arrow is shard 2 of the token store \w+, and the manifest beside it expects shard 1"),
        (miscount, r"shard-00000\.arrow holds \d+ documents of [\d,]+ tokens, the manifest expects"),
        (not_arrow, r"shard-00000\.arrow is damaged, or is not a shard of tokens.*sha256 is \w{64}.*expects \w{64}"),
        (flip_at(20), r"shard-00000\.arrow is damaged.*Delete this shard; it is built again alone"),
    ],
)
def test_manifest_and_shards_that_do_not_fit_are_refused(damage, message, small_shards, build):
    damage(build().folder)
    with pytest.raises(UsageError, match=message):
        build()


def test_stores_joined_and_labelled(small_shards, store, build):
    joined = TokenStore.joined([store.labelled("x"), build()])
    assert joined.num_documents == 120
    assert joined.num_bytes == 2 * store.num_bytes
    np.testing.assert_array_equal(joined.document(75), store.document(15))
    assert [joined.label(i) for i in (0, 1, 60, 61)] == ["x", "x", "a", "b"]
    assert joined.lengths(np.array([75, 15])).tolist() == store.lengths(np.array([15, 15])).tolist()


def test_full_disk(build, monkeypatch, tmp_path):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UsageError, match=r"no space left for the token cache in .*bytes free.*Free some space"):
        build()
    assert not list(tmp_path.rglob("*.arrow*"))


def test_cache_dir_that_is_a_file(corpus, byte_tokenizer):
    with pytest.raises(UsageError, match=r"cannot be used.*can be written to"):
        prepare_tokens(str(corpus), byte_tokenizer, cache_dir=corpus)


def test_source_without_text(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UsageError, match="no document with any text"):
        prepare_tokens(str(tmp_path / "a.jsonl"), byte_tokenizer, cache_dir=tmp_path / "cache")


def test_too_many_labels(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(preparation, "_MOST_LABELS", 2)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "source": s}) + "\n" for s in "abca"))
    with pytest.raises(UsageError, match="more than 2 different source labels"):
        prepare_tokens(str(tmp_path / "a.jsonl"), byte_tokenizer, cache_dir=tmp_path / "cache")
