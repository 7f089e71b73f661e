"""Tokenised documents on disk: flat arrays with offsets, memory-mapped, and a manifest that vouches for them.

KEY/
  tokens.npy     uint16 or uint32 [tokens]    every document's `[bos] tokens [eos]`, one after the other
  offsets.npy    int64  [documents + 1]       document i is tokens[offsets[i] : offsets[i + 1]]
  num_bytes.npy  int64  [documents]           length of its text in UTF-8
  source.npy     uint16 [documents]           index of its label in the manifest's "sources"
  digest.npy     uint64 [documents]           first 8 bytes of the BLAKE2b hash of its text
  manifest.json  format, key, counts, labels; size and sha256 of each file above. Written last
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
ARRAYS = ("tokens", "offsets", "num_bytes", "source", "digest")


class DamagedStore(Exception):
    """A folder that should hold a token store does not hold a whole one."""


@dataclass(frozen=True)
class TokenStore:
    """An opened store; the arrays are read-only memory maps of the files above.

    Attributes:
        folder: where it lies.
        key: hexadecimal name of its contents (source and tokenizer).
        sources: the labels; `sources[source[i]]` is that of document i.
        tokens, offsets, num_bytes, source, digest: see the module's text.
    """

    folder: Path
    key: str
    sources: list[str]
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    source: np.ndarray
    digest: np.ndarray

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "TokenStore":
        """Open the store in `folder`. File sizes are always checked, sha256 sums if `verify`.

        Raises:
            DamagedStore: something is missing, of another format, or not as the manifest says.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise DamagedStore(f"its format is {manifest['format']}, expected {FORMAT}")
            for name, expected in manifest["files"].items():
                if (folder / name).stat().st_size != expected["size"]:
                    raise DamagedStore(f"{name} is not {expected['size']} bytes long")
                if verify and sha256_of(folder / name) != expected["sha256"]:
                    raise DamagedStore(f"{name} does not have the sha256 it was written with")
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            return cls(folder, manifest["key"], manifest["sources"], **arrays)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStore(f"{type(error).__name__}: {error}") from error

    @property
    def num_documents(self) -> int:
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Number of tokens of each of `documents` (int64, bos and eos counted)."""
        return self.offsets[documents + 1] - self.offsets[documents]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def label(self, index: int) -> str:
        """The source label of one document."""
        return self.sources[self.source[index]]


def write_manifest(folder: Path, **entries: Any) -> None:
    """Close a store: `entries` and the size and sha256 of each array."""
    files = {
        f"{name}.npy": {
            "size": (folder / f"{name}.npy").stat().st_size,
            "sha256": sha256_of(folder / f"{name}.npy"),
        }
        for name in ARRAYS
    }
    text = json.dumps({"format": FORMAT, **entries, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def sha256_of(file: Path) -> str:
    with file.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()


class ArrayWriter:
    """Writes a one-dimensional `.npy` file piece by piece, whose length is known only at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: Any) -> None:
        array = np.asarray(values, self.dtype)
        self._file.write(array.tobytes())
        self.length += array.size

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # numpy pads its header so that the length can grow in place.
                self._file.seek(0)
                self._write_header()
                assert self._file.tell() == self._data_start
        finally:
            self._file.close()

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.length,),
            },
        )
