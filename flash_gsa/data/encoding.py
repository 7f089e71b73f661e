"""Documents to token ids, in parallel and without reading special tokens out of plain text."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The backend needs some hundred bytes a token while it works, so what it is given at once is bounded.
_PIECE_CHARACTERS = 50_000
_CALL_CHARACTERS = 1_000_000
_CUT = re.compile(r"(?<=\w) (?=\w)")


def encode_documents(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> list[np.ndarray]:
    """`[bos] tokens [eos]` of every text (bos or eos left out where the tokenizer has none).

    Returns one array a text, uint16 where the vocabulary allows it, else uint32. What looks like a
    special token inside a text is encoded as the text it is. A text of more than 50,000 characters is
    encoded in parts cut at a single space between two letters or digits; ids are those of the whole
    text for every tokenizer whose tokens do not reach across such a space (all built-in ones).
    """
    return list(DocumentEncoder.of(tokenizer)(texts))


class DocumentEncoder:
    """`encode_documents`, prepared once for many calls. Works on its own copy of the tokenizer; can be pickled."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "DocumentEncoder":
        definition = tokenizer.backend_tokenizer.to_str()
        return cls(definition, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)

    def __init__(self, definition: str, vocab_size: int, bos: int | None, eos: int | None) -> None:
        from tokenizers import Tokenizer

        self._arguments = (definition, vocab_size, bos, eos)
        self._backend = Tokenizer.from_str(definition)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._bos = np.array([] if bos is None else [bos], self.dtype)
        self._eos = np.array([] if eos is None else [eos], self.dtype)
        # A tokenizer that writes a space in front of every text supplies the one at which a text is cut.
        whole, *parts = (self._ids(text) for text in ("to be", "to", " be", "be"))
        self._can_cut = whole in (parts[0] + parts[1], parts[0] + parts[2])
        self._space_is_implied = whole == parts[0] + parts[2]

    def __reduce__(self) -> tuple[type, tuple]:
        return DocumentEncoder, self._arguments

    def __call__(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each text, in order."""
        document = [self._bos]
        for group in _grouped(piece for text in texts for piece in self._cut(text)):
            encoded = self._backend.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
            for (_, last), encoding in zip(group, encoded, strict=True):
                document.append(np.array(encoding.ids, self.dtype))
                if last:
                    yield np.concatenate([*document, self._eos])
                    document = [self._bos]

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """(piece, whether it is the text's last)."""
        start = 0
        while self._can_cut and len(text) - start > _PIECE_CHARACTERS:
            space = _CUT.search(text, start + _PIECE_CHARACTERS)
            if space is None:
                break
            yield text[start : space.start()], False
            start = space.end() if self._space_is_implied else space.start()
        yield text[start:], True


def _grouped(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    group: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[0])
        if characters >= _CALL_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hexadecimal sha256 of all that decides the ids of a document."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call of the tokenizer; of no effect here.
    definition.pop("padding")
    definition.pop("truncation")
    decides = [definition, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
