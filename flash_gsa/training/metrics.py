"""What a run writes about itself: metrics.jsonl, whose lines trackers are told too.

One JSON object a line. Every line has `kind`, `step` (from 1; 0 is the untrained model), `tokens` (seen so far, with
padding and unscored positions) and `seconds` (spent training so far, over all resumes). By `kind`:

    train   loss (nats a scored token, of this step), bits_per_byte (where bytes are known), lr,
            grad_norm (before clipping), tokens_per_second and flops_per_second (of this step, over all processes; see
            `flash_gsa.models.flops`), mfu (of that, the share of the devices' peak; known GPUs in bf16 only),
            memory_bytes (peak of the first process), data_seconds (of this step's time, spent waiting for its batch),
            devices (number of processes)
    eval    text: loss, bits_per_byte, by_source {source: bits per byte}; MQAR: accuracy (0 to 1);
            forgetting, slot_entropy, dead_slots {layer: …}, see `flash_gsa.inspection.slot_usage`
    spike   loss (of this step), expected (mean of the steps before), limit (what it is above), batch (its index in the
            stream); see `flash_gsa.training.spikes`
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flash_gsa.errors import UsageError
from flash_gsa.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A last line cut short by a crash is left out.

    Raises:
        UsageError: another line is damaged.
    """
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                record["kind"], record["step"]
            except (ValueError, TypeError, KeyError):
                raise UsageError(
                    f"line {number} of {path} is damaged: expected a JSON object with kind and step, found "
                    f"{line[:60]!r}. Remove that line"
                ) from None
            records.append(record)
    return records


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl`, and tells trackers.

    Args:
        resume_step: the step the run goes on from: later records, of steps that will be run again, are
            removed first. None starts empty.
        trackers: told each record too; closed with the file.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None, trackers: Sequence[Tracker] = ()) -> None:
        self.path = run_dir / METRICS_FILE
        self._trackers = trackers
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        else:
            _truncate(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it is in the file, though perhaps not on the disk, when this returns."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(record)

    def sync(self) -> None:
        """Waits until everything written is on the disk; a checkpoint may only follow its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Closes the file and the trackers, each of them though another fails; then raises how one failed."""
        with ExitStack() as last_first:
            for tracker in reversed(self._trackers):
                last_first.callback(tracker.close)
            last_first.callback(self._file.close)


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if r["step"] <= step]
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    aside.replace(path)
