"""What a run writes about itself: metrics.jsonl, and the same numbers for TensorBoard.

One JSON object a line. Every line has `kind` ("train" or "eval"), `step` (from 1; 0 is the untrained model),
`tokens` (seen so far, with padding and unscored positions) and `seconds` (spent training so far, over all
resumes). Then

    train   loss (nats a scored token, of this step), bits_per_byte (where bytes are known), lr,
            grad_norm (before clipping), tokens_per_second and flops_per_second (of this step; see
            `flash_gsa.models.flops`), mfu (of that, the share of the device's peak; known GPUs in bf16 only),
            memory_bytes (peak)
    eval    text: loss, bits_per_byte, by_source {source: bits per byte}; MQAR: accuracy (0 to 1);
            forgetting, slot_entropy, dead_slots {layer: …}, see `flash_gsa.inspection.slot_usage`
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A last line cut short by a crash is left out."""
    records = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl` and, if wanted, to `run_dir/tensorboard`.

    Args:
        resume_step: the step the run goes on from: later records, of steps that will be run again, are
            removed first. 0 with `resume_step=None` starts empty.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None, tensorboard: bool) -> None:
        self.path = run_dir / METRICS_FILE
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        else:
            _truncate(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it is in the file, though perhaps not on the disk, when this returns."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Waits until everything written is on the disk; a checkpoint may only follow its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if r["step"] <= step]
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    aside.replace(path)


def _scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    kind = record["kind"]
    found = []
    for name, value in record.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, Mapping):
            found += [(f"{kind}/{name}/{source}", float(v)) for source, v in value.items()]
        elif value is not None:
            found.append((f"{kind}/{name}", float(value)))
    return found
