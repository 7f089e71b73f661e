"""Text of a token sequence, token by token, though one character may need several tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of an unfinished character to."""


class IncrementalText:
    """Decodes a growing sequence: the pieces joined are the text of the whole.

    A token is decoded together with those of the piece before, because a piece's text may depend on where
    it stands (a leading space, for instance). While the text ends in an unfinished character the piece is
    empty; the character comes with its last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0  # where the piece before starts
        self._done = 0  # how many ids have been given out

    def push(self, token_id: int) -> str:
        """The text that `token_id` adds; "" while a character is unfinished."""
        self._ids.append(token_id)
        text = self._decode(self._context, len(self._ids))
        if text.endswith(UNFINISHED):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What was held back: an unfinished character, as U+FFFD."""
        if self._done == len(self._ids):
            return ""
        return self._advance(self._decode(self._context, len(self._ids)))

    def _advance(self, text: str) -> str:
        piece = text[len(self._decode(self._context, self._done)) :]
        self._context, self._done = self._done, len(self._ids)
        return piece

    def _decode(self, start: int, stop: int) -> str:
        text = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, special tokens by name; joined, they are the whole text."""
    text = IncrementalText(tokenizer, skip_special_tokens=False)
    pieces = [text.push(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += text.finish()
    return pieces
