"""What a text source gives: documents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flash_gsa.errors import UsageError, did_you_mean


class Document(NamedTuple):
    """One text.

    `source` is the label that results are reported under (the part of a corpus it is from), `name`
    says where it was found, for people.
    """

    text: str
    source: str
    name: str


PartReader = Callable[[], Iterator[Document]]
"""Reads one part of a source from its beginning."""


class Source(Protocol):
    """A place that documents come from."""

    def parts(self) -> Sequence[PartReader]:
        """Its files, or whatever can be read without reading what comes before: the documents are those of each part
        in turn, always in the same order.

        Raises:
            UsageError: something there is not as it should be (the parts raise it too); the message names it.
        """

    def fingerprint(self) -> str:
        """A string that differs whenever the documents would."""


class Fields(NamedTuple):
    """Which fields of a record hold the text and the source label; `a.b` is the field b of the record in a field a.

    `source` None: a field named "source" where there is one, else the label of the whole file.
    """

    text: str = "text"
    source: str | None = None

    def document(self, record: Mapping[str, Any], *, name: str, label: str) -> Document:
        """The document in one record; `name` is where the record is, `label` the file's own label.

        Raises:
            UsageError: a field is missing, or is not a text that UTF-8 can express.
        """
        text = self._string(record, self.text, "text", name)
        if self.source is not None:
            label = self._string(record, self.source, "source", name)
        elif isinstance(record.get("source"), str):
            label = record["source"]
        return Document(text, label, name)

    def _string(self, record: Mapping[str, Any], field: str, role: str, name: str) -> str:
        try:
            value = _value(record, field)
        except KeyError:
            raise UsageError(missing_field(field, role, _names(record), name)) from None
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise UsageError(f"{name}: field {field!r} is {kind}, expected a string. Correct or drop the record")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{name}: field {field!r} holds half of a surrogate pair (U+{ord(value[error.start]):04X}) at "
                    f"character {error.start}, which is not text. Correct or drop the record"
                ) from error
        return value


def _value(record: Mapping[str, Any], field: str) -> Any:
    if field in record:  # a field may have a dot in its own name
        return record[field]
    outer, _, inner = field.partition(".")
    if not inner or not isinstance(record.get(outer), Mapping):
        raise KeyError(field)
    return _value(record[outer], inner)


def _names(record: Mapping[str, Any]) -> list[str]:
    """Of all fields, those of records within it by their whole names."""
    return [
        whole
        for name, value in record.items()
        for whole in ([f"{name}.{inner}" for inner in _names(value)] if isinstance(value, Mapping) else [name])
    ]


def missing_field(field: str, role: str, fields: list[str], name: str) -> str:
    """The message for a record or table without `field`; `role` is "text" or "source"."""
    present = ", ".join(map(repr, fields)) or "none"
    return (
        f"{name}: no field {field!r}; there are: {present}.{did_you_mean(field, fields)} "
        f"Set {role}_field (in a recipe data.{role}_field) to the name of the field that holds the {role}"
    )
