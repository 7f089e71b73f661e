"""The loss curve of a run, from its metrics.jsonl."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _HELD_OUT = "tab:blue", "tab:orange"


def plot_loss(metrics: Path, picture: Path | None = None) -> Path:
    """Draws the training loss and the held-out score over the steps.

    The held-out loss of text shares the axis of the training loss, with bits per byte on the right; the accuracy
    of a recall task has the right axis to itself.

    Args:
        metrics: a metrics.jsonl, or a run folder.
        picture: where the PNG goes; by default `loss.png` beside the metrics.

    Returns:
        The path of the picture.

    Raises:
        UsageError: there is no such file, or nothing has been logged yet.
    """
    from matplotlib.figure import Figure

    if metrics.is_dir():
        metrics = metrics / METRICS_FILE
    if not metrics.is_file():
        raise UsageError(f"{metrics} does not exist: expected the metrics.jsonl of a run, or a run folder")
    records = read_metrics(metrics)
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    if not train:
        raise UsageError(f"{metrics} holds no training step yet, so there is nothing to draw")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    last = train[-1]
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=1.5, label="training loss (moving average)")
    axes.set_xlabel(f"step ({last['tokens'] / last['step']:,.0f} tokens each)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{metrics.parent.name}: {last['tokens'] / 1e6:,.2f} M tokens in {_duration(last['seconds'])}")
    axes.grid(alpha=0.3)
    if held_out:
        draw = _held_out_loss if "loss" in held_out[-1] else _held_out_accuracy
        draw(axes, held_out)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    picture = picture or metrics.with_name("loss.png")
    figure.savefig(picture, dpi=150)
    return picture


def _held_out_loss(axes: "Axes", held_out: list[dict[str, Any]]) -> None:
    last = held_out[-1]
    _points(axes, held_out, "loss", f"held-out loss (at the end {last['bits_per_byte']:.3f} bits per byte)")
    # Nats a token and bits a byte of one text differ by a constant factor.
    factor = last["bits_per_byte"] / last["loss"]
    right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
    right.set_ylabel("bits per byte of held-out text")


def _held_out_accuracy(axes: "Axes", held_out: list[dict[str, Any]]) -> None:
    right = axes.twinx()
    right.set_ylim(-0.02, 1.02)
    right.set_ylabel("accuracy on held-out queries")
    _points(right, held_out, "accuracy", f"held-out accuracy (at the end {held_out[-1]['accuracy']:.3f})")


def _points(axes: "Axes", records: list[dict[str, Any]], name: str, label: str) -> None:
    steps, values = [r["step"] for r in records], [r[name] for r in records]
    axes.plot(steps, values, color=_HELD_OUT, marker="o", markersize=3, linewidth=1.5, label=label)


def _smooth(values: list[float]) -> np.ndarray:
    """Mean of the values around each one, over about a fiftieth of the curve (less at its ends)."""
    reach = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    low, high = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
