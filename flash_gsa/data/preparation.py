"""Text to tokens, once: reads a source, writes a `TokenStore` into a cache and finds it there next time."""

import errno
import hashlib
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flash_gsa.data.documents import Document
from flash_gsa.data.encoding import DocumentEncoder, tokenizer_fingerprint
from flash_gsa.data.sources import open_sources, sources_fingerprint
from flash_gsa.data.store import FORMAT, ArrayWriter, DamagedStore, TokenStore, write_manifest
from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600
_DOCUMENTS_AT_ONCE = 256


def prepare_tokens(
    documents: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    cache_dir: str | Path,
    text_field: str = "text",
    source_field: str | None = None,
    max_bytes: int | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The tokenised documents of a source, from the cache if they are there.

    The store lies in `cache_dir/KEY`, KEY made of the contents of the source (see `Source.fingerprint`;
    files beyond 64 MiB count by path, size and time of change), the tokenizer and the arguments below. It is built
    beside its place and renamed, so that an interrupted build is never taken for a whole one. A
    damaged store is built again, with a warning. Memory stays bounded whatever the source's size.

    Args:
        documents, text_field, source_field: as for `iter_documents`.
        tokenizer: see `load_tokenizer`; documents become `[bos] tokens [eos]`.
        cache_dir: made if it is not there; any number of stores and processes may share it.
        max_bytes: stop after the document with which the texts reach this many UTF-8 bytes (for streamed data
            sets without end).
        verify: compare sha256 sums too when the store is in the cache already; sizes are always compared.
        progress: called with (documents, UTF-8 bytes) done so far, while building.

    Raises:
        UsageError: what is wrong with the source, an unusable cache folder, no space left on the device.
    """
    sources = open_sources(documents, text_field=text_field, source_field=source_field)
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"max_bytes is {max_bytes}, expected at least 1, or None for everything")
    decides = [FORMAT, sources_fingerprint(sources), tokenizer_fingerprint(tokenizer), max_bytes]
    key = hashlib.sha256(repr(decides).encode()).hexdigest()[:24]
    cache = Path(cache_dir).expanduser()
    folder = cache / key
    try:
        if folder.exists():
            try:
                return TokenStore.open(folder, verify=verify)
            except DamagedStore as damage:
                warnings.warn(f"the token cache {folder} is damaged ({damage}); building it again", stacklevel=2)
                shutil.rmtree(folder)
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        building = cache / f"{key}{_BUILDING}{uuid.uuid4().hex[:8]}"
        building.mkdir()
        try:
            found = (document for source in sources for document in source.documents())
            wanted = found if max_bytes is None else _limited(found, max_bytes)
            _build(building, key, wanted, tokenizer, progress)
            _move(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UsageError(_storage_problem(cache, error)) from error
    return TokenStore.open(folder)


def _build(
    folder: Path,
    key: str,
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    progress: Callable[[int, int], None] | None,
) -> None:
    encoder = DocumentEncoder(tokenizer)
    labels: dict[str, int] = {}
    num_documents = num_bytes = num_tokens = 0
    with ExitStack() as stack:

        def writer(name: str, dtype: object) -> ArrayWriter:
            return stack.enter_context(ArrayWriter(folder / f"{name}.npy", dtype))

        tokens, offsets = writer("tokens", encoder.dtype), writer("offsets", np.int64)
        lengths, source = writer("num_bytes", np.int64), writer("source", np.uint16)
        digests = writer("digest", np.uint64)
        offsets.append([0])
        for group in _groups(documents):
            for document, ids in zip(group, encoder(document.text for document in group), strict=True):
                text = document.text.encode()
                tokens.append(ids)
                num_tokens += len(ids)
                num_bytes += len(text)
                offsets.append([num_tokens])
                lengths.append([len(text)])
                source.append([labels.setdefault(document.source, len(labels))])
                digests.append(np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u8"))
                if len(labels) > 2**16:
                    raise UsageError(
                        "the documents have more than 65,536 different source labels; labels name the parts of a "
                        "corpus. Set source_field to a field that does"
                    )
            num_documents += len(group)
            if progress is not None:
                progress(num_documents, num_bytes)
    if not num_documents:
        raise UsageError("the source holds no document with any text. Name another source")
    write_manifest(folder, key=key, documents=num_documents, tokens=num_tokens, bytes=num_bytes, sources=list(labels))


def _limited(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    done = 0
    for document in documents:
        yield document
        done += len(document.text.encode())
        if done >= max_bytes:
            return


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Up to `_DOCUMENTS_AT_ONCE` documents; fewer of them where they are long, so that memory stays bounded."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _DOCUMENTS_AT_ONCE or characters > 1 << 20:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _move(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        # Another process has built the same store in the meantime; its contents are the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed builds left behind: no file of theirs has changed for a day."""
    for folder in cache.glob(f"*{_BUILDING}*"):
        # Another process may finish or remove it while we look.
        with suppress(OSError):
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - changed > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _storage_problem(cache: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"no space left for the token cache in {cache} ({free:,} bytes free). It takes about 2 bytes a token (4 "
            "with a vocabulary above 65,536). Free some space or name another folder; nothing incomplete was kept"
        )
    return f"the token cache {cache} cannot be used: {error.strerror or error}. Name a folder that can be written to"
