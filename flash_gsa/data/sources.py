"""Text sources by name. To add one, write a class with the two methods of `Source` and a line here."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from flash_gsa.data.documents import Document, Fields, Source
from flash_gsa.data.files import FileSource
from flash_gsa.data.hub import HubDataset
from flash_gsa.data.stdlib import StandardLibrary
from flash_gsa.errors import UsageError

__all__ = ["SOURCES", "Document", "Source", "iter_documents", "open_sources", "sources_fingerprint"]

# What stands before the first colon of a spec → what reads it. Anything else is a path.
SOURCES: dict[str, Callable[[str, Fields], Source]] = {
    "stdlib": lambda spec, fields: StandardLibrary(),
    "hf": HubDataset,
}


def iter_documents(
    spec: str | Sequence[str], *, text_field: str = "text", source_field: str | None = None
) -> Iterator[Document]:
    """The documents of one source or of several in turn, always in the same order.

    Args:
        spec: `"stdlib"`; `"hf:ORG/NAME[/CONFIG][@SPLIT]"`; a file, folder or pattern (`.txt`, `.md`, `.rst`, `.py`,
            `.jsonl`, `.parquet`, or a text file without suffix; plain, `.gz`, `.xz` or `.zst`); or a list of these.
        text_field: the field of a record (JSON lines, Parquet, hub) that holds the text.
        source_field: the field that holds the label for reporting; by default a field "source" where there is
            one, else the name of the file or data set. Of records in records: "meta.set".

    Raises:
        UsageError: what is wrong with the spec (at once) or with a document (when it is reached).
    """
    sources = open_sources(spec, text_field=text_field, source_field=source_field)
    return (document for source in sources for part in source.parts() for document in part())


def open_sources(
    spec: str | Sequence[str], *, text_field: str = "text", source_field: str | None = None
) -> list[Source]:
    """The sources that `spec` names, checked to be there but not read; arguments as for `iter_documents`."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs or not all(specs):
        raise UsageError(
            f"no text source in {spec!r}. Expected a path, a pattern, 'stdlib', 'hf:ORG/NAME', or a list of these"
        )
    fields = Fields(text_field, source_field)
    return [SOURCES.get(one.partition(":")[0], FileSource)(one, fields) for one in specs]


def sources_fingerprint(sources: Sequence[Source]) -> str:
    """Hexadecimal sha256 of what `sources` hold."""
    return hashlib.sha256(repr([source.fingerprint() for source in sources]).encode()).hexdigest()
