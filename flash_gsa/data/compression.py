"""The bytes of a file that may be compressed, with a cut-off file never taken for a whole one."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from flash_gsa.errors import UsageError

_CHUNK = 1 << 18

DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def read_chunks(path: Path) -> Iterator[bytes]:
    """The contents of `path` in pieces, decompressed if it ends in .gz, .xz or .zst (several
    compressed streams one after the other are read as one).

    Raises:
        UsageError: the file cannot be read, is cut off, or is not what its suffix says.
    """
    try:
        with path.open("rb") as file:
            chunks = iter(lambda: file.read(_CHUNK), b"")
            new_decompressor = DECOMPRESSORS.get(path.suffix.lower())
            if new_decompressor is None:
                yield from chunks
            else:
                yield from _decompressed(chunks, new_decompressor, path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UsageError:
    """The refusal of a file that the system does not let us read."""
    return UsageError(f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions")


def _decompressed(chunks: Iterator[bytes], new_decompressor: Callable[[], Any], path: Path) -> Iterator[bytes]:
    # The readers of gzip, lzma and zstandard differ in what they make of a cut-off file (the last returns what
    # there is and says nothing); their decompressor objects all know whether they have seen the end.
    decompressor = None
    for chunk in chunks:
        while chunk:
            if decompressor is None:
                # Between two streams gzip and xz allow padding of zeros.
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    break
                decompressor = new_decompressor()
            try:
                data = decompressor.decompress(chunk)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                raise UsageError(
                    f"{path} is damaged or is not a {path.suffix} file ({error}). Copy or compress it again, or give "
                    "it the suffix of what it is"
                ) from error
            if data:
                yield data
            chunk = b""
            if decompressor.eof:
                chunk, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise UsageError(f"{path} is cut off: its {path.suffix} stream has no end. Copy or compress it again")
