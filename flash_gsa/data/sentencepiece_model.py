"""Reads the pieces of a sentencepiece `.model` file without the sentencepiece package.

The file is a protocol buffer. Of its message only three things are needed here:

    ModelProto       1: SentencePiece (repeated)      3: NormalizerSpec
    SentencePiece    1: piece (string)  2: score (float32)  3: type (enum, NORMAL when absent)
    NormalizerSpec   1: name  3: add_dummy_prefix  4: remove_extra_whitespaces  5: escape_whitespaces

A wire format of two dozen lines is less fragile than generated protobuf code, which is tied to the
version of the protobuf package that happens to be installed.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    score: float
    type: PieceType


class SentencePieceModel(NamedTuple):
    """`pieces[id]`, and the normaliser's name and switches."""

    pieces: list[Piece]
    normalizer: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Parse a sentencepiece model file.

    Raises:
        ValueError: the file is not a well-formed protocol buffer.
    """
    pieces: list[Piece] = []
    normalizer: dict[int, bytes | int] = {}
    for number, value in _fields(path.read_bytes()):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score = piece[1], piece.get(2, b"\0\0\0\0")
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            kind = piece.get(3, PieceType.NORMAL)
            assert isinstance(kind, int)
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], PieceType(kind)))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    name = normalizer.get(1, b"")
    assert isinstance(name, bytes)
    return SentencePieceModel(pieces, name.decode(), *(bool(normalizer.get(switch, True)) for switch in (3, 4, 5)))


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of one message: int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown protocol buffer wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"protocol buffer ends inside field {number} at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("protocol buffer ends inside a number")
