"""The text every machine with Python has: the code and the prose of its own standard library."""

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from flash_gsa.data.documents import Document, PartReader
from flash_gsa.errors import UsageError

_ENOUGH_BYTES = 1_000_000
# Tests are left out by every distribution or by some; packages and build settings are the machine's own; encodings
# are generated tables; pydoc_data is read as prose below.
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_GENERATED = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


class StandardLibrary:
    """Its `.py` files (source label "code") and the reference manual that `help()` shows ("prose").

    In the order of their names; without tests, installed packages, generated tables and repeated
    contents. About 11 MB; how much there is depends on the version of Python and its packager.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def parts(self) -> Sequence[PartReader]:
        return [self.documents]

    def documents(self) -> Iterator[Document]:
        """All of them, in order."""
        seen: set[bytes] = set()
        size = 0
        for document in (*self._code(), *self._prose()):
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen and document.text.strip():
                seen.add(digest)
                size += len(document.text.encode())
                yield document
        if size < _ENOUGH_BYTES:
            raise UsageError(
                f"the standard library of this Python ({self.root}) holds only {size:,} bytes of source text, expected "
                "at least 1 MB: it may be trimmed or zipped. Use another Python, or name text files of your own"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(f"{document.source} {len(document.text)} ".encode())
            digest.update(document.text.encode())
        return digest.hexdigest()

    def _code(self) -> Iterator[Document]:
        for file in sorted(self.root.rglob("*.py")):
            name = file.relative_to(self.root)
            if _LEFT_OUT.isdisjoint(name.parts) and not any(p.startswith(_GENERATED) for p in name.parts):
                try:
                    yield Document(file.read_bytes().decode(), "code", str(name))
                except (UnicodeDecodeError, OSError):
                    continue

    def _prose(self) -> Iterator[Document]:
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            return
        for name in sorted(topics):
            yield Document(topics[name], "prose", f"help({name!r})")
