"""A data set of the Hugging Face hub (or any that `datasets.load_dataset` knows), streamed."""

from collections.abc import Iterator

from flash_gsa.data.documents import Document, Fields
from flash_gsa.errors import UsageError


class HubDataset:
    """`hf:NAME`, `hf:ORG/NAME` or `hf:ORG/NAME/CONFIG`, each with an optional `@SPLIT` (train by default).

    Raises:
        UsageError: the spec cannot be read, `datasets` is not installed, or (from `documents`) the data set
            cannot be reached or has no such configuration, split or field.
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

    def documents(self) -> Iterator[Document]:
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"source {self.spec!r} needs the package datasets, which is not installed: "
                'pip install "flash-gsa[data]"'
            ) from error
        row = -1
        try:
            for row, record in enumerate(
                datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            ):
                where = f"{self.spec}, record {row}"
                document = self.fields.document(record, name=where, label=self.name.rpartition("/")[2])
                if document.text:
                    yield document
        except UsageError:
            raise
        except Exception as error:
            # What can go wrong inside ranges from name resolution to the data set's own files.
            raise UsageError(
                f"source {self.spec!r} cannot be read after {row + 1} records ({type(error).__name__}: {error}). "
                "Check the network and the names of data set, configuration and split; or download it and name "
                "its files"
            ) from error

    def fingerprint(self) -> str:
        """The spec itself: a data set on the hub is taken to stay what it is."""
        return repr([self.fields, self.spec])
