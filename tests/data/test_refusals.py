"""Every bad text source is refused by name, with the place of the fault and what to do."""

import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flash_gsa.data import iter_documents
from flash_gsa.errors import UsageError

TEXT = ("A line of text to be cut off. " * 400).encode()


def refused(spec, message, **fields):
    with pytest.raises(UsageError, match=message):
        list(iter_documents(spec, **fields))


BAD_FILES = [
    ("a.txt", b"", r"a\.txt is empty"),
    ("a.txt", b" \n\t\n", r"a\.txt is empty"),
    ("a.txt", b"ab\0c", r"a\.txt is binary \(a NUL byte at offset 2\)"),
    ("a.txt", "caf\xe9".encode("latin-1"), r"not UTF-8: byte 0xe9 at offset 3, line 1.*iconv"),
    ("a.txt", b"\xef\xbb\xbfone\ntwo\n\xff", r"byte 0xff at offset 11, line 3"),
    ("a.txt", "text".encode("utf-16"), r"UTF-16.*iconv"),
    ("a.jsonl", b"", r"a\.jsonl is empty"),
    ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"line 3 is a JSON list, expected an object"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"txet": "b", "n": 1}\n',
        r"line 2: no field 'text'; there are: 'txet', 'n'.*text_field",
    ),
    ("a.jsonl", b"{}\n", r"line 1: no field 'text'; there are: none"),
    ("a.jsonl", b'{"text": 5}\n', r"line 1: field 'text' is int, expected a string"),
    (
        "a.jsonl",
        b'{"text": "ab\\ud83d"}\n',
        r"line 1: field 'text' holds half of a surrogate pair \(U\+D83D\) at character 2",
    ),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"byte 0xe9 at offset 24, line 2"),
    ("a.jsonl", b'{"text": "a\0"}\n', r"NUL byte at offset 11"),
    ("a.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
    ("a.parquet", b"PAR1 but not really", r"cannot be read as Parquet"),
    ("a.parquet", b"", r"cannot be read as Parquet"),
    ("a.docx", b"x", r"unknown format '\.docx'\. Expected \.txt.*rename it to \.txt"),
    ("a.json", b"{}", r"unknown format '\.json'.*one object a line"),
    ("a.tar.gz", b"x", r"unknown format '\.tar'"),
    ("a.txt.bz2", b"x", r"unknown format '\.bz2'"),
    ("a.txt.gz", b"plain text", r"a\.txt\.gz is damaged or is not a \.gz file"),
    ("a.txt.xz", b"plain text", r"a\.txt\.xz is damaged or is not a \.xz file"),
    ("a.txt.zst", b"plain text", r"a\.txt\.zst is damaged or is not a \.zst file"),
    ("a.txt.gz", gzip.compress(TEXT)[:-9], r"a\.txt\.gz is cut off"),
    ("a.txt.gz", gzip.compress(TEXT)[:5], r"a\.txt\.gz is cut off"),
    ("a.txt.gz", gzip.compress(TEXT) + b"garbage", r"a\.txt\.gz is damaged"),
    ("a.txt.gz", gzip.compress(TEXT)[:-5] + b"12345", r"a\.txt\.gz is damaged"),
    ("a.txt.xz", lzma.compress(TEXT)[:-9], r"a\.txt\.xz is cut off"),
    ("a.txt.zst", zstandard.compress(TEXT)[:-2], r"a\.txt\.zst is cut off"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\nx\n'), r"line 2 is not JSON"),
]


@pytest.mark.parametrize(
    ("name", "contents", "message"), BAD_FILES, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(BAD_FILES)]
)
def test_bad_files(name, contents, message, tmp_path):
    (tmp_path / name).write_bytes(contents)
    refused(str(tmp_path / name), message)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    refused(str(tmp_path / "corpsu.txt"), r"no file, folder or source .*corpsu\.txt'\. Did you mean 'corpus\.txt'")
    refused(str(tmp_path / "nowhere" / "x.txt"), "no file, folder or source")
    refused("stdlbi", "no file, folder or source of the name 'stdlbi'.*'stdlib'")


def test_pattern_and_folder_without_files(tmp_path):
    refused(str(tmp_path / "*.txt"), r"no file matches the pattern")
    refused(str(tmp_path), r"holds no \.txt, \.jsonl, \.parquet file")


@pytest.mark.parametrize("spec", ["", [], ["stdlib", ""]])
def test_no_source_at_all(spec):
    refused(spec, "no text source")


def test_file_that_vanishes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    documents = iter_documents(str(file))
    file.unlink()
    with pytest.raises(UsageError, match=r"a\.txt cannot be read: No such file"):
        list(documents)


def test_source_field_that_is_not_there(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a", "source": "s"}))
    refused(str(file), "no field 'sorce'.*Did you mean 'source'.*source_field", source_field="sorce")


def test_parquet_columns(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), file)
    refused(str(file), r"a\.parquet: no field 'text'; there are: 'body', 'n'")
    refused(str(file), r"no field 'kind'.*source_field", text_field="body", source_field="kind")
    refused(str(file), r"row 0: field 'n' is int", text_field="n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), file)
    refused(str(file), r"row 1: field 'text' is null")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    refused(str(file), r"has no rows")


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c/d", "hf:a//b", "hf:a/b@"])
def test_hub_specs(spec):
    refused(spec, r"expected 'hf:ORG/NAME'")


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused("hf:org/name", r"'hf:org/name' cannot be read \(ConnectionError: no route to host\).*network")


def test_hub_that_breaks_off(monkeypatch):
    def records():
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(records))
    refused("hf:org/name", r"cannot be read after 1 records of file 0 \(ConnectionError: reset by peer\).*network")
