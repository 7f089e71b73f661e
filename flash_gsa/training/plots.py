"""The loss curve of a run, from its metrics.jsonl."""

from pathlib import Path

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import METRICS_FILE, read_metrics


def plot_loss(metrics: Path, picture: Path | None = None) -> Path:
    """Draws train and held-out loss over the steps, and bits per byte on a second axis where known.

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
    picture = picture or metrics.with_name("loss.png")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.5, label="training (moving average)")
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["loss"] for r in held_out],
            color="tab:orange",
            marker="o",
            markersize=3,
            linewidth=1.5,
            label="held out",
        )
    axes.set_xlabel(f"step ({train[-1]['tokens'] / train[-1]['step']:,.0f} tokens each)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{metrics.parent.name}: {train[-1]['tokens'] / 1e6:,.1f} M tokens in {_duration(train[-1])}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    bits = [r for r in held_out if r.get("bits_per_byte")]
    if bits:
        # Nats a token and bits a byte of one held-out text differ by a constant factor.
        factor = bits[-1]["bits_per_byte"] / bits[-1]["loss"]
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte (held-out text)")
        last = bits[-1]
        axes.annotate(
            f"{last['bits_per_byte']:.3f} bits/byte",
            (last["step"], last["loss"]),
            textcoords="offset points",
            xytext=(-4, 14),
            ha="right",
            color="tab:orange",
        )
    figure.savefig(picture, dpi=150)
    return picture


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the curve, without a bias at its start."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 50)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1.0
        smoothed.append(total / weight)
    return smoothed


def _duration(record: dict) -> str:
    minutes, seconds = divmod(round(record["seconds"]), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
