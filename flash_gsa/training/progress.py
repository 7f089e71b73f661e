"""Progress for people: a live bar in a terminal, plain lines elsewhere, from one of a run's processes."""

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status

from flash_gsa.training.events import Ended, Evaluated, Event, Preparing, Saved, Spiked, Started, Stepped

_SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """A listener for `train(on_event=…)`; use it as a context manager, which leaves the terminal in order.

    In a terminal: a bar with step, loss, tokens/s and time left. Where output is a file or a pipe: plain lines, of
    steps at most one every ten seconds; scores, checkpoints and loss spikes always. Of several processes
    (torchrun and accelerate number them by RANK) the first shows, the others are silent.
    """

    def __init__(self, console: Console | None = None) -> None:
        first = os.environ.get("RANK", "0") == "0"
        self.console = (console or Console()) if first else Console(quiet=True)
        # FORCE_COLOR, which build machines like to set, makes a pipe a terminal to rich; a bar needs a real one.
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.file.isatty()
        self._live = terminal and first
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line: float | None = None

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        match event:
            case Preparing(what):
                self._prepare(what)
            case Started():
                self._start(event)
            case Stepped():
                self._step(event)
            case Evaluated(record):
                self._say(f"step {record['step']:>6}  held out: {_score(record)}")
            case Spiked(record):
                expected = f"{record['expected']:.3f} expected, batch {record['batch']}"
                self._say(f"step {record['step']:>6}  loss spike: {record['loss']:.3f}, {expected}; training goes on")
            case Saved(folder):
                self._say(f"checkpoint {folder}")
            case Ended(step, signal):
                self._close()
                if signal:
                    self._say(f"Stopped by {signal} after step {step}. The same command goes on from there.")

    def _prepare(self, what: str) -> None:
        if self._live:
            if self._status is None:
                self._status = self.console.status(what)
                self._status.start()
            self._status.update(what)
        elif self._is_time():
            self._say(what)

    def _start(self, event: Started) -> None:
        self._close()
        goes_on = f", going on after step {event.step}" if event.step else ""
        self._say(
            f"{event.parameters / 1e6:.2f} M parameters, {event.tokens_per_step:,} tokens a step, on "
            f"{event.engine}{goes_on}; everything goes to {event.run_dir}"
        )
        for line in event.data:
            self._say(line)
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("training", total=1.0, figures="")
            self._bar.start()

    def _step(self, event: Stepped) -> None:
        record = event.record
        of = f"/{event.total_steps}" if event.total_steps else ""
        left = f"  {_clock(event.seconds_left)} left"
        share = f"  {record['mfu']:.0%} of peak" if "mfu" in record else ""
        figures = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s{share}{left}"
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=event.fraction,
                description=f"step {record['step']}{of}",
                figures=figures,
            )
        elif self._is_time() or event.fraction >= 1.0:
            self._say(f"step {record['step']:>6}{of}  {figures}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _is_time(self) -> bool:
        now = time.monotonic()
        if self._last_line is not None and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def _close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _score(record: Mapping[str, Any]) -> str:
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "bits_per_byte" in record:
        parts.append(f"{record['bits_per_byte']:.3f} bits per byte")
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
