"""How far a general-purpose compressor gets on a text, for scale beside a language model."""

import lzma
from collections.abc import Iterable


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits of xz output (preset 9 extreme, one stream over all documents in order) per byte of input.

    Unlike a language model trained elsewhere, xz learns from the text itself: small texts look bad.

    Raises:
        ValueError: the documents hold no bytes.
    """
    text = b"".join(documents)
    if not text:
        raise ValueError("no bytes to compress; expected at least one")
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
