"""What a run tells whoever watches it: `train(recipe, on_event=f)` calls `f` with one of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preparing:
    """A slow part before the first step has begun."""

    what: str


@dataclass(frozen=True)
class Started:
    """The first step is next. `step` is 0, or the step of the checkpoint the run goes on from. `data` says what is
    trained on, a line a source."""

    run_dir: Path
    step: int
    parameters: int
    tokens_per_step: int
    engine: str
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stepped:
    """A step was taken; `record` holds its figures (see `metrics`), `fraction` of the run is done."""

    record: Mapping[str, Any]
    total_steps: int | None
    fraction: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """Held-out data was scored; `record` is the line of metrics.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Spiked:
    """The loss rose far above the steps before (see `spikes`); `record` is the line of metrics.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    folder: Path


@dataclass(frozen=True)
class Ended:
    """The run is over: finished, or (`signal`, e.g. "SIGTERM") stopped to be resumed by the same command."""

    step: int
    signal: str | None


Event = Preparing | Started | Stepped | Evaluated | Spiked | Saved | Ended
Listener = Callable[[Event], None]
