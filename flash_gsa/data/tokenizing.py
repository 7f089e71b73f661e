"""Pieces of text to tokens on all cores: each piece is encoded by one process, and they come back in order."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np

from flash_gsa.data.encoding import DocumentEncoder
from flash_gsa.data.manifest import Place
from flash_gsa.data.shards import Rows
from flash_gsa.errors import UsageError

# Processes take seconds to start, in which one encodes this much.
_WORTH_PROCESSES = 16 << 20


class Piece(NamedTuple):
    """Neighbouring documents of one shard.

    Attributes:
        shard: its number.
        texts, source: one of each a document; `source` is the index of its label.
        bytes: of all texts, in UTF-8.
        end: where the source goes on after them.
    """

    shard: int
    texts: list[str]
    source: list[int]
    bytes: int
    end: Place


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_order(
    pieces: Iterable[Piece], encoder: DocumentEncoder, processes: int
) -> Generator[tuple[Piece, Rows], None, None]:
    """Every piece with its rows, in the order given, whatever the number of processes.

    With one process, or little text, everything is done in this one. At most two pieces a process are held.

    Raises:
        UsageError: a process was killed.
    """
    pieces = iter(pieces)
    first: list[Piece] = []
    while processes > 1 and sum(piece.bytes for piece in first) < _WORTH_PROCESSES:
        piece = next(pieces, None)
        if piece is None:
            processes = 1
        else:
            first.append(piece)
    every = chain(first, pieces)
    if processes == 1:
        yield from ((piece, encode(encoder, piece)) for piece in every)
        return
    # Not a fork of this process: it may have threads (the tokenizer's, a GPU's) that would be missing in the child.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, context, _begin, (encoder,))
    waiting: deque[tuple[Piece, Future[Rows]]] = deque()
    try:
        for piece in every:
            waiting.append((piece, pool.submit(_encode_here, piece)))
            if len(waiting) == 2 * processes:
                piece, future = waiting.popleft()
                yield piece, future.result()
        for piece, future in waiting:
            yield piece, future.result()
    except BrokenProcessPool as error:
        raise UsageError(
            f"one of the {processes} processes that tokenise could not start or was killed (for want of memory?). "
            "Shards that are whole are kept: do it again, with fewer processes if memory was short. In a script, the "
            "call must stand under `if __name__ == '__main__':`, or be made with processes=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode(encoder: DocumentEncoder, piece: Piece) -> Rows:
    """The documents of one piece as rows of a shard."""
    tokens = list(encoder(piece.texts))
    texts = [text.encode() for text in piece.texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return Rows(
        np.concatenate(tokens),
        np.array([len(ids) for ids in tokens]),
        np.array([len(text) for text in texts]),
        np.array(piece.source, np.uint16),
        np.frombuffer(digests, "<u8").astype(np.uint64),
    )


_encoder: DocumentEncoder


def _begin(encoder: DocumentEncoder) -> None:
    """Makes this process one that encodes."""
    global _encoder
    _encoder = encoder
    # The cores are taken by processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot say so, and its children would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_here(piece: Piece) -> Rows:
    return encode(_encoder, piece)
