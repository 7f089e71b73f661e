"""What the sources give; what they refuse is in test_refusals.py."""

import gzip
import json
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flash_gsa.data import Document, iter_documents
from flash_gsa.data.sources import open_sources, sources_fingerprint
from flash_gsa.data.stdlib import StandardLibrary
from flash_gsa.errors import UsageError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
RECORDS = [
    {"text": "one\n\u2028é", "source": "left"},
    {"text": "", "source": "left"},
    {"text": "🙂", "source": "right", "n": 3},
]


def json_lines(records) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def fingerprint(spec, **fields):
    return sources_fingerprint(open_sources(spec, **fields))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_files_are_one_document_each(suffix, tmp_path):
    file = tmp_path / f"letters.txt{suffix}"
    file.write_bytes(COMPRESS[suffix]("\ufeffDear é,\r\n…\n".encode()))
    assert list(iter_documents(str(file))) == [Document("Dear é,\r\n…\n", "letters", str(file))]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("last_line_ends", [True, False])
def test_json_lines(suffix, last_line_ends, tmp_path):
    file = tmp_path / f"part.jsonl{suffix}"
    data = b"\n" + json_lines(RECORDS)
    file.write_bytes(COMPRESS[suffix](data if last_line_ends else data[:-1]))
    assert list(iter_documents(str(file))) == [
        Document("one\n\u2028é", "left", f"{file}, line 2"),
        Document("🙂", "right", f"{file}, line 4"),
    ]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_parquet(suffix, tmp_path):
    plain, file = tmp_path / "plain", tmp_path / f"part.parquet{suffix}"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), plain)
    file.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert [document[:2] for document in iter_documents(str(file))] == [("one\n\u2028é", "left"), ("🙂", "right")]


def test_fields_by_name(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(json_lines([{"body": "a", "kind": "k", "source": "s"}]))
    assert [d.source for d in iter_documents(str(file), text_field="body")] == ["s"]
    assert [d.source for d in iter_documents(str(file), text_field="body", source_field="kind")] == ["k"]
    file.write_bytes(json_lines([{"body": "a"}]))
    assert [d.source for d in iter_documents(str(file), text_field="body")] == ["x"]


NESTED = [{"meta": {"set": "left", "body": {"text": "a"}}, "a.b": "c"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fields_of_records_in_records(suffix, tmp_path):
    file = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(NESTED), file)
    else:
        file.write_bytes(json_lines(NESTED))
    within = {"text_field": "meta.body.text", "source_field": "meta.set"}
    assert [document[:2] for document in iter_documents(str(file), **within)] == [("a", "left")]
    assert [document[:2] for document in iter_documents(str(file), text_field="a.b")] == [("c", "x")]
    with pytest.raises(UsageError, match=r"no field 'meta\.st'; there are: 'meta\.set', .* Did you mean 'meta\.set'"):
        list(iter_documents(str(file), **within | {"source_field": "meta.st"}))
    with pytest.raises(UsageError, match=r"no field 'meta\.set\.x'"):
        list(iter_documents(str(file), **within | {"source_field": "meta.set.x"}))


def test_long_lines_and_streams_in_many_chunks(tmp_path):
    texts = ["x" * 700_000, "y", "é" * 300_000]
    file = tmp_path / "long.jsonl.xz"
    parts = [lzma.compress(json_lines([{"text": text}])) for text in texts]
    # Several streams in one file, with the padding that xz allows.
    file.write_bytes(parts[0] + parts[1] + b"\0" * 8 + parts[2])
    assert [d.text for d in iter_documents(str(file))] == texts


def test_folder_takes_corpora_in_order_and_leaves_the_rest(tmp_path):
    for name in ("b.txt", "sub/a.txt", "README.md", "run.py", ".hidden/c.txt", "notes.docx", "a.txt.gz"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(COMPRESS[".gz"](b"z") if name.endswith("gz") else name.encode())
    assert [d.text for d in iter_documents(str(tmp_path))] == ["z", "b.txt", "sub/a.txt"]
    assert [d.text for d in iter_documents(str(tmp_path / "*.md"))] == ["README.md"]
    assert [d.text for d in iter_documents(str(tmp_path / "**" / "?.txt"))] == ["b.txt", "sub/a.txt"]


def test_several_sources_one_after_the_other(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "LICENSE").write_text("b")
    specs = [str(tmp_path / "LICENSE"), str(tmp_path / "a.txt")]
    assert [(d.text, d.source) for d in iter_documents(specs)] == [("b", "LICENSE"), ("a", "a")]


def test_fingerprint_follows_contents_and_fields_not_place(tmp_path):
    first, moved = tmp_path / "a.txt", tmp_path / "elsewhere" / "a.txt"
    moved.parent.mkdir()
    first.write_text("text")
    moved.write_text("text")
    assert fingerprint(str(first)) == fingerprint(str(moved))
    assert fingerprint(str(first)) != fingerprint(str(first), text_field="body")
    moved.write_text("texT")
    assert fingerprint(str(first)) != fingerprint(str(moved))


def test_fingerprint_of_large_files_follows_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("flash_gsa.data.files._HASHED_BYTES", 3)
    file = tmp_path / "a.txt"
    file.write_text("text")
    before = fingerprint(str(file))
    assert fingerprint(str(file)) == before
    file.write_text("text2")
    assert fingerprint(str(file)) != before


def test_standard_library_gives_code_and_prose_once_each():
    documents = list(iter_documents("stdlib"))
    names = [document.name for document in documents]
    assert "asyncio/tasks.py" in names
    assert "help('yield')" in names
    assert not any(part in {"test", "tests", "site-packages", "encodings"} for n in names for part in Path(n).parts)
    assert len({document.text for document in documents}) == len(documents)
    size = {label: sum(len(d.text) for d in documents if d.source == label) for label in ("code", "prose")}
    assert size["code"] > 3_000_000
    assert size["prose"] > 200_000
    assert documents == list(iter_documents("stdlib"))


def make_library(root, size):
    for name in ("a.py", "test/t.py", "sub/tests/t.py", "site-packages/p.py", "_sysconfigdata_x.py", "config-3/c.py"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}\n".ljust(size))
    (root / "copy.py").write_text((root / "a.py").read_text())
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é".encode("latin-1"))


def test_standard_library_leaves_out_tests_packages_copies_and_other_encodings(tmp_path, monkeypatch):
    make_library(tmp_path, 1_000_000)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert [d.name for d in StandardLibrary(tmp_path).documents()] == ["a.py"]


def test_trimmed_standard_library_is_refused(tmp_path, monkeypatch):
    make_library(tmp_path, 1000)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="only 1,000 bytes"):
        list(StandardLibrary(tmp_path).documents())


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hf:wiki", ("wiki", None, "train")),
        ("hf:org/wiki@test", ("org/wiki", None, "test")),
        ("hf:org/wiki/small@train[:10]", ("org/wiki", "small", "train[:10]")),
    ],
)
def test_hub_data_sets_are_streamed_file_by_file(spec, asked, monkeypatch):
    files = [[{"text": "a"}, {"text": ""}, {"text": "b", "source": "s"}], [{"text": "c"}]]

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split) == asked
        assert streaming
        return datasets.IterableDataset.from_generator(
            lambda files: (record for file in files for record in file), gen_kwargs={"files": files}
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    first, second = open_sources(spec)[0].parts()
    assert list(second()) == [Document("c", "wiki", f"{spec}, file 1, record 0")]
    assert list(first()) == [
        Document("a", "wiki", f"{spec}, file 0, record 0"),
        Document("b", "s", f"{spec}, file 0, record 2"),
    ]
    assert [document.text for document in iter_documents(spec)] == ["a", "b", "c"]


def test_local_data_set_through_datasets(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for name in ("train-0", "train-1", "train-2", "test"):
        (tmp_path / "mine" / f"{name}.jsonl").write_bytes(json_lines([{"text": f"{name} {i}"} for i in range(3)]))
    (tmp_path / "mine" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: default, default: true, data_files: [{split: train, path: 'train-*.jsonl'}]}\n"
        "- {config_name: small, data_files: [{split: test, path: test.jsonl}]}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(open_sources("hf:./mine")[0].parts()) == 3
    assert [d.text for d in iter_documents("hf:./mine")] == [f"train-{k} {i}" for k in range(3) for i in range(3)]
    assert [d.text for d in iter_documents("hf:./mine/small@test")] == ["test 0", "test 1", "test 2"]
    with pytest.raises(UsageError, match=r"'hf:\./mine@valid' cannot be read"):
        list(iter_documents("hf:./mine@valid"))
