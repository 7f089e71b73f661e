"""A data set of the Hugging Face hub (or any that `datasets.load_dataset` knows), streamed."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from flash_gsa.data.documents import Document, Fields, PartReader
from flash_gsa.errors import UsageError


class HubDataset:
    """`hf:NAME`, `hf:ORG/NAME` or `hf:ORG/NAME/CONFIG`, each with an optional `@SPLIT` (train by default).

    Its parts are the files it is stored in, each streamed when its turn comes.

    Raises:
        UsageError: the spec cannot be read, or (from `parts` and what they give) the data set cannot be reached or
            has no such configuration, split or field.
    """

    def __init__(self, spec: str, fields: Fields) -> None:
        path, _, split = spec.removeprefix("hf:").partition("@")
        parts = path.split("/")
        if not all(parts) or len(parts) > 3 or spec.endswith("@"):
            raise UsageError(
                f"source {spec!r}: expected 'hf:ORG/NAME', with '/CONFIG' and '@SPLIT' where needed, for "
                "instance 'hf:Salesforce/wikitext/wikitext-2-raw-v1@train'"
            )
        self.spec, self.fields = spec, fields
        self.name = "/".join(parts[:2])
        self.config = parts[2] if len(parts) == 3 else None
        self.split = split or "train"

    def parts(self) -> Sequence[PartReader]:
        import datasets

        try:
            data = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:
            # What can go wrong inside ranges from name resolution to the data set's own files.
            raise self._unreadable("cannot be read", error) from error
        return [partial(self._read, data, number) for number in range(data.num_shards)]

    def fingerprint(self) -> str:
        """The spec itself: a data set on the hub is taken to stay what it is."""
        return repr([self.fields, self.spec])

    def _read(self, data: Any, number: int) -> Iterator[Document]:
        label = self.name.rpartition("/")[2]
        where = self.spec if data.num_shards == 1 else f"{self.spec}, file {number}"
        row = -1
        try:
            for row, record in enumerate(data.shard(data.num_shards, number)):
                document = self.fields.document(record, name=f"{where}, record {row}", label=label)
                if document.text:
                    yield document
        except UsageError:
            raise
        except Exception as error:
            raise self._unreadable(f"cannot be read after {row + 1} records of file {number}", error) from error

    def _unreadable(self, what: str, error: Exception) -> UsageError:
        return UsageError(
            f"source {self.spec!r} {what} ({type(error).__name__}: {error}). Check the network and the names of data "
            "set, configuration and split; or download it and name its files"
        )
