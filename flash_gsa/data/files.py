"""Local files as a source: one file, a folder or a pattern; plain or compressed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob, has_magic
from pathlib import Path

from flash_gsa.data.compression import DECOMPRESSORS, unreadable
from flash_gsa.data.documents import Document, Fields, PartReader
from flash_gsa.data.readers import read_json_lines, read_parquet, read_text
from flash_gsa.errors import UsageError, did_you_mean

Reader = Callable[[Path, str, Fields], Iterator[Document]]

READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".rst": read_text,
    ".py": read_text,
    "": read_text,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}
# What a folder is searched for: corpora, and not the README or the script that lies beside them.
IN_FOLDERS = (".txt", ".jsonl", ".parquet")

# Files of more bytes together are recognised by path, size and time of change instead of being read twice.
_HASHED_BYTES = 64 << 20


class FileSource:
    """The documents of the files that `spec` names, files in the order of their paths.

    `spec` is a file (any format of `READERS`), a pattern with `*`, `?`, `[…]` or `**`, or a folder, which
    stands for every `.txt`, `.jsonl` and `.parquet` file inside it at any depth (hidden ones left out).

    Raises:
        UsageError: nothing there, or a file of an unknown format.
    """

    def __init__(self, spec: str, fields: Fields) -> None:
        self.fields = fields
        self.files = _find(spec)
        for file in self.files:
            if _format(file) not in READERS:
                raise UsageError(_unknown_format(file))

    def parts(self) -> Sequence[PartReader]:
        return [partial(READERS[_format(file)], file, _label(file), self.fields) for file in self.files]

    def fingerprint(self) -> str:
        identity = _identities(self.files)
        return repr([self.fields, *((_label(f), _format(f), i) for f, i in zip(self.files, identity, strict=True))])


def _find(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in sorted(path.rglob("*")) if _format(file) in IN_FOLDERS and file.is_file())
        files = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if not files:
            raise UsageError(
                f"the folder {spec!r} holds no {', '.join(IN_FOLDERS)} file (plain, {', '.join(DECOMPRESSORS)}). "
                "Name another folder, or name files of other formats one by one or by a pattern"
            )
        return files
    if has_magic(str(path)):
        files = [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise UsageError(f"no file matches the pattern {spec!r}. Check it with: ls {spec}")
        return files
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(
        f"there is no file, folder or source of the name {spec!r}.{did_you_mean(path.name, siblings)} Expected a path, "
        "a pattern, 'stdlib', or 'hf:ORG/NAME'"
    )


def _stem_and_format(file: Path) -> tuple[str, str]:
    plain = file.with_suffix("") if file.suffix.lower() in DECOMPRESSORS else file
    return plain.stem, plain.suffix.lower()


def _format(file: Path) -> str:
    return _stem_and_format(file)[1]


def _label(file: Path) -> str:
    return _stem_and_format(file)[0]


def _unknown_format(file: Path) -> str:
    suffix = _format(file)
    known = [known for known in READERS if known]
    advice = {
        ".json": "JSON is read one object a line: rewrite it as .jsonl",
        ".ndjson": "Rename it to .jsonl",
    }.get(suffix, "If it is plain text, rename it to .txt")
    return (
        f"{file}: unknown format {suffix!r}.{did_you_mean(suffix, known)} Expected {', '.join(known)} or no suffix, "
        f"plain or with {', '.join(DECOMPRESSORS)}. {advice}"
    )


def _identities(files: Sequence[Path]) -> list[str]:
    """What is compared to find out whether the files have changed."""
    file = files[0]
    try:
        status = [file.stat() for file in files]
        if sum(one.st_size for one in status) > _HASHED_BYTES:
            return [f"{file.resolve()} {s.st_size} {s.st_mtime_ns}" for file, s in zip(files, status, strict=True)]
        identities = []
        for file in files:
            with file.open("rb") as contents:
                identities.append(hashlib.file_digest(contents, "sha256").hexdigest())
        return identities
    except OSError as error:
        raise unreadable(Path(error.filename or file), error) from error
