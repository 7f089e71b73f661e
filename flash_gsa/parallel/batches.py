"""A process's stretch of a batch."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..data import Batch


def stretch(batch: "Batch", rank: int, ranks: int) -> "Batch":
    """What process `rank` of `ranks` computes of a batch: tokens rank·T/ranks … (rank + 1)·T/ranks of every row.

    Packed text is one row, which is cut as it is: where its sequences begin and end does not matter. Targets are cut
    with the tokens, being shifted already; the boundaries stay those of the whole row, as context parallelism expects.

    Args:
        batch: the same on every process.

    Returns:
        A batch with `input_ids` and `targets` [B, T / ranks] and the same `cu_seqlens`. The loss of the whole is the
        sum over processes of their summed losses, divided by the number of scored tokens of the whole.

    Raises:
        UsageError: rows that cannot be cut into equal stretches.
    """
    length = batch.input_ids.shape[1]
    if length % ranks or length == 0:
        fewer, more = length // ranks * ranks, (length // ranks + 1) * ranks
        raise UsageError(
            f"rows of {length} tokens cannot be cut into equal stretches for {ranks} processes; make them "
            f"{f'{fewer} or ' if fewer else ''}{more} tokens long, or use another number of processes"
        )
    own = slice(rank * (length // ranks), (rank + 1) * (length // ranks))
    return replace(batch, input_ids=batch.input_ids[:, own], targets=batch.targets[:, own])
