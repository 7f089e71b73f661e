"""Text to tokens, once: reads a source, writes a `TokenStore` into a cache and finds it there next time."""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from flash_gsa.data.documents import Document, PartReader
from flash_gsa.data.encoding import DocumentEncoder, tokenizer_fingerprint
from flash_gsa.data.manifest import UNFINISHED, WHOLE, Contents, Manifest, Place, ShardRecord, read_manifest
from flash_gsa.data.shards import Rows, sha256_of, write_shard
from flash_gsa.data.sources import open_sources, sources_fingerprint
from flash_gsa.data.store import TokenStore
from flash_gsa.data.tokenizing import Piece, encode_in_order, usable_cores
from flash_gsa.data.verification import Verified, Verify
from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int, int], None]

# Bytes of text a shard: a few hundred MB of tokens.
_SHARD_BYTES = 512 << 20
# Bytes of text that a process encodes at once: about a second's work.
_PIECE_BYTES = 2 << 20
_MOST_LABELS = 1 << 16


def prepare_tokens(
    documents: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    cache_dir: str | Path,
    text_field: str = "text",
    source_field: str | None = None,
    max_bytes: int | None = None,
    verify: Verify = "once",
    processes: int | None = None,
    progress: Progress | None = None,
    verifying: Progress | None = None,
) -> TokenStore:
    """The tokenised documents of a source, from the cache if they are there.

    The store lies in `cache_dir/KEY`, KEY made of the contents of the source (see `Source.fingerprint`;
    files beyond 64 MiB together count by path, size and time of change), the tokenizer and the arguments below. It is
    written shard by shard: a build that was stopped goes on behind its last whole shard, and a shard that was deleted
    is built again alone. The bytes of every shard are the same for any number of processes. Memory stays bounded
    whatever the source's size. Of several processes that ask for the same store one builds it and the others wait.

    Args:
        documents, text_field, source_field: as for `iter_documents`.
        tokenizer: see `load_tokenizer`; documents become `[bos] tokens [eos]`.
        cache_dir: made if it is not there; any number of stores and processes may share it.
        max_bytes: stop after the document with which the texts reach this many UTF-8 bytes (for streamed data
            sets without end).
        verify: compare sha256 sums of the shards with the manifest, besides sizes, which always are: "once" of shards
            that were neither written nor compared before, or whose size or time of change is another since; True: of
            all that this call does not write; False: of none.
        processes: how many tokenise; by default as many as there are cores this process may use, and only this one
            where the source is small.
        progress: called with (documents, UTF-8 bytes) done so far, while building.
        verifying: called with (bytes read so far, bytes to read), while comparing sums.

    Raises:
        UsageError: what is wrong with the source, an unusable cache folder, no space left on the device, a damaged
            store.
    """
    sources = open_sources(documents, text_field=text_field, source_field=source_field)
    for name, value in (("max_bytes", max_bytes), ("processes", processes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1, or None for all there are")
    if verify not in ("once", True, False):
        raise UsageError(f"verify is {verify!r}, expected 'once', True or False")
    began = time.time()
    contents = Contents(sources_fingerprint(sources), tokenizer_fingerprint(tokenizer), max_bytes)
    cache = Path(cache_dir).expanduser()
    folder = cache / contents.key
    try:
        if not _whole(folder, contents):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock", poll_interval=0.5):
                if not _whole(folder, contents):  # another process may have built it while this one waited
                    build = _Build(folder, contents, DocumentEncoder.of(tokenizer), progress)
                    build.run([part for source in sources for part in source.parts()], processes or usable_cores())
        store = TokenStore.open(folder, expected=contents, verify=verify, began=began, progress=verifying)
        # Not the number of its tokens: ids may leave gaps.
        return replace(store, vocab_size=1 + max(tokenizer.get_vocab().values()))
    except OSError as error:
        raise UsageError(_storage_problem(cache, error)) from error


def _whole(folder: Path, contents: Contents) -> bool:
    manifest = read_manifest(folder / WHOLE, contents)
    return manifest is not None and all((folder / shard.file).exists() for shard in manifest.shards)


class _Build:
    """Makes the shards that are missing."""

    def __init__(self, folder: Path, contents: Contents, encoder: DocumentEncoder, progress: Progress | None) -> None:
        self.folder, self.contents, self.encoder, self.progress = folder, contents, encoder, progress
        for left_behind in folder.glob("*.partial"):
            left_behind.unlink()
        finished = read_manifest(folder / WHOLE, contents)
        self.finished = finished is not None
        self.manifest = finished or read_manifest(folder / UNFINISHED, contents) or Manifest(contents)
        self.verified = Verified(folder)

    def run(self, parts: Sequence[PartReader], processes: int) -> None:
        """Reads the parts of the source as far as shards are missing, and writes those."""
        present = [shard for shard in self.manifest.shards if (self.folder / shard.file).exists()]
        num_documents, num_bytes = sum(s.documents for s in present), sum(s.bytes for s in present)
        number, end, rows = -1, Place(), list[Rows]()
        # Closed at once if something fails: it has processes to end.
        with closing(encode_in_order(self._pieces(parts), self.encoder, processes)) as encoding:
            for piece, encoded in encoding:
                if rows and piece.shard != number:
                    self._write(number, rows, end)
                number, end = piece.shard, piece.end
                rows.append(encoded)
                num_documents += len(piece.texts)
                num_bytes += piece.bytes
                if self.progress is not None:
                    self.progress(num_documents, num_bytes)
        if rows:
            self._write(number, rows, end)
        if not self.manifest.shards:
            raise UsageError("the source holds no document with any text. Name another source")
        if not self.finished:
            self.manifest.save(self.folder / WHOLE)
            (self.folder / UNFINISHED).unlink()

    def _pieces(self, parts: Sequence[PartReader]) -> Iterator[Piece]:
        """The documents of all missing shards. Those of a shard that is there are not read, but for the beginning of
        the part in which it ends."""
        known = self.manifest.shards[:]
        labels = {label: index for index, label in enumerate(self.manifest.labels)}
        number, place, before = 0, Place(), 0
        documents: Iterator[tuple[Document, Place]] | None = None
        while not (self.finished and number == len(known)):
            if number < len(known) and (self.folder / known[number].file).exists():
                place, documents = known[number].end, None
                before += known[number].bytes
                number += 1
                continue
            limit = _SHARD_BYTES
            if self.contents.max_bytes is not None:
                limit = min(limit, self.contents.max_bytes - before)
            if limit <= 0:
                return
            if documents is None:
                documents = _read(parts, place)
            size = 0
            texts, source, piece_bytes = list[str](), list[int](), 0
            for document, place in documents:
                if document.source not in labels:
                    labels[document.source] = self._new_label(document.source)
                texts.append(document.text)
                source.append(labels[document.source])
                length = len(document.text) if document.text.isascii() else len(document.text.encode())
                size, piece_bytes = size + length, piece_bytes + length
                if size >= limit or piece_bytes >= _PIECE_BYTES:
                    yield Piece(number, texts, source, piece_bytes, place)
                    texts, source, piece_bytes = [], [], 0
                if size >= limit:
                    break
            else:
                if texts:
                    yield Piece(number, texts, source, piece_bytes, place)
                return
            before += size
            number += 1

    def _new_label(self, label: str) -> int:
        if len(self.manifest.labels) == _MOST_LABELS:
            raise UsageError(
                f"the documents have more than {_MOST_LABELS:,} different source labels; labels name the parts of a "
                "corpus. Set source_field to a field that does"
            )
        self.manifest.labels.append(label)
        return len(self.manifest.labels) - 1

    def _write(self, number: int, rows: list[Rows], end: Place) -> None:
        """Writes one shard (and empties `rows`), then the manifest so far."""
        counts = {
            "documents": sum(len(r.lengths) for r in rows),
            "tokens": sum(len(r.tokens) for r in rows),
            "bytes": sum(int(r.num_bytes.sum()) for r in rows),
        }
        path = self.folder / f"shard-{number:05d}.arrow"
        write_shard(path, self.contents.key, number, rows)
        status = path.stat()
        record = ShardRecord(path.name, status.st_size, sha256_of(path), **counts, end=end)
        shards = self.manifest.shards
        if number == len(shards):
            shards.append(record)
            self.manifest.save(self.folder / UNFINISHED)
        elif record != shards[number]:
            path.unlink()
            raise UsageError(
                f"the shard {path} was built again and is not what it was: its sha256 is {record.sha256}, and the "
                f"manifest expects {shards[number].sha256}. The source or a library has changed since; delete the "
                f"folder {self.folder}, and all of it is built again"
            )
        self.verified.add(path.name, status, record.sha256)


def _read(parts: Sequence[PartReader], start: Place) -> Iterator[tuple[Document, Place]]:
    """The documents from `start` on, each with the place after it."""
    for part in range(start.part, len(parts)):
        skipped = start.documents if part == start.part else 0
        for count, document in enumerate(parts[part](), 1):
            if count > skipped:
                yield document, Place(part, count)


def _storage_problem(cache: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        return (
            f"no space left for the token cache in {cache} ({free:,} bytes free). It takes about 2 bytes a token (4 "
            "with a vocabulary above 65,536). Free some space or name another folder; the shards that are whole are "
            "kept"
        )
    return f"the token cache {cache} cannot be used: {error.strerror or error}. Name a folder that can be written to"
