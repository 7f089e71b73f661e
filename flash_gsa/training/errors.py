"""How a training run ends early."""

from pathlib import Path

from flash_gsa.errors import UsageError


class NotWritten(UsageError):
    """The disk did not take what a run writes: its metrics or a checkpoint."""

    status = 1


class TrainingStopped(UsageError):
    """The loss or the gradient was no longer a finite number; the weights were not touched by it.

    Attributes:
        step: the step, counted from 1, that could not be taken.
        checkpoint: the last good checkpoint, or None if none had been written.
        everywhere: see `UsageError`.
    """

    status = 1

    def __init__(self, message: str, *, step: int, checkpoint: Path | None, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.step = step
        self.checkpoint = checkpoint
