"""One shard of a token store: an Arrow file (IPC stream, as `datasets` writes them) with one row a document.

    tokens     large_list<uint16 | uint32>   `[bos] tokens [eos]`
    num_bytes  int64                         length of its text in UTF-8
    source     uint16                        index of its label in the manifest's "labels"
    digest     uint64                        first 8 bytes of the BLAKE2b hash of its text

All rows are one record batch, so every column is one stretch of the file and can be mapped as a NumPy array. The
schema's metadata say which store and which shard of it this is. `datasets.Dataset.from_file` opens it too.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from flash_gsa.errors import UsageError


class Rows(NamedTuple):
    """Encoded documents, one after the other.

    `tokens` uint16 or uint32 `[tokens]`; `lengths` int64, `num_bytes` int64, `source` uint16, `digest` uint64
    `[documents]`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    source: np.ndarray
    digest: np.ndarray


@dataclass(frozen=True)
class Shard:
    """An opened shard; the arrays are read-only maps of its file.

    `offsets` int64 `[documents + 1]`: document i is `tokens[offsets[i] : offsets[i + 1]]`. `labels[source[i]]` is its
    label.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    source: np.ndarray
    digest: np.ndarray
    labels: list[str]


def write_shard(path: Path, key: str, number: int, pieces: list[Rows]) -> None:
    """Write `pieces` as shard `number` of the store `key`; they are emptied on the way. On disk when this returns.

    Under another name until it is whole, so a file of this name is a whole one.
    """
    count = sum(len(piece.tokens) for piece in pieces)
    tokens = np.empty(count, pieces[0].tokens.dtype)
    lengths, num_bytes, source, digest = (
        np.concatenate([getattr(piece, name) for piece in pieces]) for name in Rows._fields[1:]
    )
    end = 0
    while pieces:  # each is let go when it is copied: a shard is in memory once, not twice
        piece = pieces.pop(0).tokens
        tokens[end : end + len(piece)] = piece
        end += len(piece)
    offsets = np.append(0, np.cumsum(lengths))
    batch = pa.record_batch(
        {
            "tokens": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
            "num_bytes": num_bytes,
            "source": source,
            "digest": digest,
        }
    ).replace_schema_metadata({"store": key, "shard": str(number)})
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("wb") as file:
            with pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def open_shard(path: Path, key: str, number: int, labels: list[str], sha256: str) -> Shard:
    """Map shard `number` of the store `key`. Reads nothing but the schema.

    Raises:
        UsageError: it is damaged or is not a shard, then told with its sha256 and the one expected; or it is that of
            another store or number.
        OSError: it cannot be opened.
    """
    # Closing the file leaves the map: thousands of shards need no open files.
    with pa.memory_map(str(path)) as file:
        try:
            with pa.ipc.open_stream(file) as reader:
                metadata = {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
                batch = reader.read_next_batch()
            batch.validate()  # sizes only; without it a damaged one could crash the process
            tokens = batch.column("tokens")
            num_bytes, source, digest = (batch.column(name).to_numpy() for name in ("num_bytes", "source", "digest"))
            values, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
            shard = Shard(path, values, offsets, num_bytes, source, digest, labels)
        # The file is open and mapped: an OSError too is what Arrow says of contents that it cannot make out.
        except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration, AttributeError) as error:
            raise UsageError(
                f"the shard {path} is damaged, or is not a shard of tokens ({type(error).__name__}: {error}): its "
                f"sha256 is {sha256_of(path)}, and the manifest expects {sha256}. Delete this shard; it is built again "
                "alone"
            ) from error
    found, expected = (metadata.get("store"), metadata.get("shard")), (key, str(number))
    if found != expected:
        raise UsageError(
            f"{path} is shard {found[1]} of the token store {found[0]}, and the manifest beside it expects "
            f"shard {number} of {key}. Delete this shard; it is built again alone"
        )
    return shard


def sha256_of(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()
