"""Which shards were read and have the sha256 of the manifest: kept, so that terabytes are not read at every start.

    verified.json    by shard: size and time of change of the file that was read, its sha256, and when that was

It lies beside the shards; of a folder that cannot be written to, in the user's cache.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock

from flash_gsa.data.manifest import ShardRecord
from flash_gsa.data.shards import sha256_of
from flash_gsa.data.tokenizing import usable_cores
from flash_gsa.errors import UsageError

VERIFIED = "verified.json"
Verify = Literal["once"] | bool
Progress = Callable[[int, int], None]


class _Reading(NamedTuple):
    """A file as it was when it was read; `at` in seconds since 1970."""

    size: int
    mtime_ns: int
    sha256: str
    at: float


class Verified:
    """The `verified.json` in a folder. What is lost of it, or cannot be written, is only read again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VERIFIED
        self._readings: dict[str, _Reading] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            for file, (size, mtime_ns, sha256, at) in json.loads(self._path.read_text(encoding="utf-8")).items():
                self._readings[file] = _Reading(size, mtime_ns, sha256, float(at))

    def covers(self, shard: ShardRecord, status: os.stat_result, since: float) -> bool:
        """Whether this file was read after `since`, is the same now, and is what its manifest says."""
        found = self._readings.get(shard.file)
        return (
            found is not None and found.at >= since and found[:3] == (status.st_size, status.st_mtime_ns, shard.sha256)
        )

    def add(self, file: str, status: os.stat_result, sha256: str) -> None:
        """Notes what a file holds. `status` is from before it was read: what changed it meanwhile is noticed later."""
        self._readings[file] = _Reading(status.st_size, status.st_mtime_ns, sha256, time.time())
        aside = self._path.with_name(VERIFIED + ".partial")
        with suppress(OSError):
            aside.write_text(json.dumps(self._readings) + "\n", encoding="utf-8")
            aside.replace(self._path)


def verify_shards(
    folder: Path, shards: Sequence[ShardRecord], *, since: float = 0.0, progress: Progress | None = None
) -> None:
    """Reads the shards in `folder` that were not read after `since`, or have changed, and compares their sha256.

    Of several processes that ask at once one reads, and the others wait for what it finds.

    Args:
        since: seconds since 1970.
        progress: called with the bytes read so far, and those there are to read.

    Raises:
        UsageError: some are damaged: names each, with both sums.
    """
    place = _place(folder)
    if not _unread(folder, shards, Verified(place), since):
        return
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):  # where no file can be locked, each process reads for itself
            stack.enter_context(FileLock(place / "lock", poll_interval=0.5))
        verified = Verified(place)
        shards = _unread(folder, shards, verified, since)
        done, size = 0, sum(shard.size for shard in shards)
        damaged = []
        pool = ThreadPoolExecutor(usable_cores())  # hashing and reading let go of the interpreter
        # If something fails, or the user has had enough, the shards not yet begun are not read.
        stack.callback(pool.shutdown, cancel_futures=True)
        found = pool.map(_read, [folder / shard.file for shard in shards])
        for shard, (status, sha256) in zip(shards, found, strict=True):
            if sha256 == shard.sha256:
                verified.add(shard.file, status, sha256)
            else:
                damaged.append(
                    f"the shard {folder / shard.file} is damaged: its sha256 is {sha256}, and the manifest expects "
                    f"{shard.sha256}. Delete this shard; it is built again alone"
                )
            done += shard.size
            if progress is not None:
                progress(done, size)
    if damaged:
        raise UsageError("\n".join(damaged))


def _unread(folder: Path, shards: Sequence[ShardRecord], verified: Verified, since: float) -> list[ShardRecord]:
    return [shard for shard in shards if not verified.covers(shard, (folder / shard.file).stat(), since)]


def _read(file: Path) -> tuple[os.stat_result, str]:
    try:
        return file.stat(), sha256_of(file)
    except OSError as error:
        raise UsageError(
            f"the shard {file} cannot be read: {error.strerror or error}. If its disk is damaged, delete this shard; "
            "it is built again alone"
        ) from error


def _place(folder: Path) -> Path:
    """Where `verified.json` lies, and the lock of who reads."""
    if os.access(folder, os.W_OK):
        return folder
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(base) / "flash-gsa" / "verified" / name
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    return place
