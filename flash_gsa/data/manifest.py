"""The manifest of a token store: what decides its contents, and its shards with their checksums."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from flash_gsa.errors import UsageError

FORMAT = 2
WHOLE = "manifest.json"
UNFINISHED = "building.json"


class Contents(NamedTuple):
    """What decides every byte of a store.

    Attributes:
        source: sha256 of the fingerprints of its sources.
        tokenizer: see `tokenizer_fingerprint`.
        max_bytes: of text; None: all there is.
        format: of the files.
    """

    source: str
    tokenizer: str
    max_bytes: int | None
    format: int = FORMAT

    @property
    def key(self) -> str:
        """Names the store: 24 hexadecimal digits."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:24]


class Place(NamedTuple):
    """A place in the source: after `documents` documents of its part `part` (see `Source.parts`)."""

    part: int = 0
    documents: int = 0


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard; `end` is where the next one begins in the source."""

    file: str
    size: int
    sha256: str
    documents: int
    tokens: int
    bytes: int
    end: Place


@dataclass
class Manifest:
    """Attributes: `contents`; `labels` of the documents, in the order in which they first occur; `shards`."""

    contents: Contents
    labels: list[str] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it in one step: `path` holds the old manifest or the new one, also after a crash."""
        totals = {name: sum(getattr(s, name) for s in self.shards) for name in ("documents", "tokens", "bytes")}
        values = {
            "key": self.contents.key,
            **self.contents._asdict(),
            **totals,
            "labels": self.labels,
            "shards": [asdict(shard) for shard in self.shards],
        }
        aside = path.with_name(path.name + ".partial")
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)


def read_manifest(path: Path, expected: Contents | None = None) -> Manifest | None:
    """The manifest in `path`, or None if there is no such file.

    Raises:
        UsageError: it cannot be read, or is of other contents than `expected`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(
            Contents(**{name: values[name] for name in Contents._fields}),
            values["labels"],
            [ShardRecord(**shard | {"end": Place(*shard["end"])}) for shard in values["shards"]],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a manifest of tokens ({type(error).__name__}: {error}). Delete its folder; it is "
            "built again"
        ) from error
    wanted = manifest.contents._replace(format=FORMAT) if expected is None else expected
    for name, found, right in zip(Contents._fields, manifest.contents, wanted, strict=True):
        if found != right:
            raise UsageError(
                f"{path} does not belong to these tokens: its {name} is {found}, expected {right}. Move that folder "
                "away or delete it; the tokens are built again"
            )
    return manifest
