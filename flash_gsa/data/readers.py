"""One reader a file format: text (one document a file), JSON lines and Parquet (one a record)."""

import json
from collections.abc import Iterator
from pathlib import Path

from flash_gsa.data.compression import read_chunks
from flash_gsa.data.documents import Document, Fields, missing_field
from flash_gsa.errors import UsageError

_UTF8_BOM = b"\xef\xbb\xbf"


def read_text(path: Path, label: str, fields: Fields) -> Iterator[Document]:
    """The whole file as one document.

    Raises:
        UsageError: the file is empty, binary or not UTF-8.
    """
    text = decode_utf8(b"".join(read_chunks(path)), path)
    if not text.strip():
        raise UsageError(f"{path} is empty. Expected text in UTF-8; remove the file or name another")
    yield Document(text, label, str(path))


def read_json_lines(path: Path, label: str, fields: Fields) -> Iterator[Document]:
    """One JSON object a line; blank lines and empty texts are passed over.

    Raises:
        UsageError: a line is not UTF-8, not a JSON object, or lacks a field; the message gives its number.
    """
    records, start = 0, 0
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        # JSON allows blanks around a value, so a line of blanks holds none.
        if line.strip():
            text = decode_utf8(line, path, first_byte=start, first_line=number)
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UsageError(f"{where} is not JSON ({error}). Expected one JSON object a line") from error
            if not isinstance(record, dict):
                raise UsageError(
                    f'{where} is a JSON {type(record).__name__}, expected an object such as {{"{fields.text}": "…"}}'
                )
            records += 1
            document = fields.document(record, name=where, label=label)
            if document.text:
                yield document
        start += len(line)
    if not records:
        raise UsageError(f"{path} is empty. Expected one JSON object a line")


def read_parquet(path: Path, label: str, fields: Fields) -> Iterator[Document]:
    """One record a row; empty texts are passed over.

    Raises:
        UsageError: the file is damaged, a column is missing, a value is not a string.
    """
    import pyarrow.parquet

    try:
        plain = path.suffix.lower() == ".parquet"
        contents = path if plain else pyarrow.BufferReader(b"".join(read_chunks(path)))
        table = pyarrow.parquet.ParquetFile(contents)
        names = table.schema_arrow.names
        wanted = []
        for field, role in ((fields.text, "text"), (fields.source or "source", "source")):
            column = field if field in names else field.partition(".")[0]  # that holds records
            if column in names:
                wanted.append(column)
            elif role == "text" or fields.source is not None:
                raise UsageError(missing_field(field, role, names, str(path)))
        row = 0
        for rows in table.iter_batches(batch_size=1024, columns=list(dict.fromkeys(wanted))):
            for record in rows.to_pylist():
                document = fields.document(record, name=f"{path}, row {row}", label=label)
                row += 1
                if document.text:
                    yield document
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(
            f"{path} cannot be read as Parquet ({error}). Copy it again, or give it the suffix of what it is"
        ) from error
    if not row:
        raise UsageError(f"{path} has no rows. Name another file")


def decode_utf8(data: bytes, path: Path, *, first_byte: int = 0, first_line: int = 1) -> str:
    """`data` as text. `first_byte` and `first_line` say where in the file it starts, for the messages.

    Raises:
        UsageError: binary data or another encoding; with the place of the first wrong byte.
    """
    if first_byte == 0:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UsageError(f"{path} is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
        if data.startswith(_UTF8_BOM):
            data, first_byte = data[3:], 3
    nul = data.find(0)
    if nul >= 0:
        raise UsageError(
            f"{path} is binary (a NUL byte at offset {first_byte + nul}), expected text in UTF-8. "
            "Name a text file, or give the file the suffix of what it is"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {first_byte + error.start}, line {line}. "
            "Convert it, for instance from Latin-1: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends; unlike `bytes.splitlines`, only a line feed ends one."""
    rest: list[bytes] = []
    for chunk in read_chunks(path):
        head, feed, tail = chunk.partition(b"\n")
        rest.append(head + feed)
        if not feed:
            continue
        yield b"".join(rest)
        *whole, last = tail.split(b"\n")
        for line in whole:
            yield line + b"\n"
        rest = [last]
    if any(rest):
        yield b"".join(rest)
