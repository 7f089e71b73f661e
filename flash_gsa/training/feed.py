"""The micro-batches of one process, made while the device computes."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from flash_gsa.data import Batch
from flash_gsa.training.inputs import Batches

_STEPS_AHEAD = 2


class Feed:
    """Steps of a batch stream, each as this process's micro-batches; the next ones are read in a thread.

    Args:
        batches: the stream; begins at its position, which `take` moves.
        parts: rows of a global batch, one slice a micro-batch.

    Attributes:
        seconds: that `take` has waited for the last step's data.
    """

    def __init__(self, batches: Batches, parts: list[slice]) -> None:
        self.batches, self.parts, self.seconds = batches, parts, 0.0
        self._next = batches.position
        self._ahead: deque[Future[list[Batch]]] = deque()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")

    def take(self) -> list[Batch]:
        """The micro-batches of the next step. What went wrong in reading them is raised here."""
        while len(self._ahead) <= _STEPS_AHEAD:
            self._ahead.append(self._reader.submit(self._read, self._next))
            self._next += 1
        began = time.monotonic()
        found = self._ahead.popleft().result()
        self.seconds = time.monotonic() - began
        self.batches.position += 1
        return found

    def close(self) -> None:
        """Stops reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, index: int) -> list[Batch]:
        return [self.batches.batch(index, part) for part in self.parts]
