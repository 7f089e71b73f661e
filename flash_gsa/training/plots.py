"""The pictures of a run, from its metrics.jsonl: loss.png, and those of its report."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = list[dict[str, Any]]

_TRAIN, _HELD_OUT, _SPIKE, _RESUME = "tab:blue", "tab:orange", "tab:red", "0.3"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LAYERS_NUMBERED = 24
_SMALL = (6, 2.9)
_LEAST_OF_HALF = 50


@dataclass(frozen=True)
class Picture:
    """A PNG with what stands above and below it."""

    title: str
    says: str
    png: bytes


def plot_loss(metrics: Path, picture: Path | None = None) -> Path:
    """Draws the training loss and the held-out score over the steps.

    The held-out loss of text shares the axis of the training loss, with bits per byte on the right; the accuracy
    of a recall task has the right axis to itself. Loss spikes are marked.

    Args:
        metrics: a metrics.jsonl, or a run folder.
        picture: where the PNG goes; by default `loss.png` beside the metrics.

    Returns:
        The path of the picture.

    Raises:
        UsageError: there is no such file, it is damaged, or nothing has been logged yet.
    """
    if metrics.is_dir():
        metrics = metrics / METRICS_FILE
    records = run_records(metrics)
    last = of_kind(records, "train")[-1]
    title = f"{metrics.parent.name}: {last['tokens'] / 1e6:,.2f} M tokens in {duration(last['seconds'])}"
    picture = picture or metrics.with_name("loss.png")
    picture.write_bytes(_loss(records, size=(8, 4.5), title=title, dpi=150))
    return picture


def run_records(metrics: Path) -> Records:
    """The records of a metrics.jsonl with at least one training step.

    Raises:
        UsageError: there is no such file, it is damaged, or nothing has been logged yet.
    """
    if not metrics.is_file():
        raise UsageError(f"{metrics} does not exist: expected the metrics.jsonl of a run, or a run folder")
    records = read_metrics(metrics)
    if not of_kind(records, "train"):
        raise UsageError(f"{metrics} holds no training step yet, so there is nothing to draw")
    return records


def of_kind(records: Records, kind: str) -> Records:
    """The records of one kind."""
    return [r for r in records if r["kind"] == kind]


def report_pictures(records: Records, resumes: Sequence[int] = ()) -> list[Picture]:
    """What a report shows of a run: the pictures for which its records have figures.

    Args:
        records: of metrics.jsonl, at least one of a training step.
        resumes: steps after which the run was resumed, marked in the picture of the loss.
    """
    train, held_out = of_kind(records, "train"), of_kind(records, "eval")
    steps = [r["step"] for r in train]
    found = [
        Picture(
            "Loss",
            "Each step, its moving average, and held-out data.",
            _loss(records, size=(12, 4.2), resumes=resumes),
        )
    ]
    half = [r for r in records if r["step"] > train[-1]["step"] / 2]
    if len(of_kind(half, "train")) >= _LEAST_OF_HALF:
        late = [step for step in resumes if step > half[0]["step"]]
        found.append(
            Picture("Loss, second half", "The same, nearer.", _loss(half, size=_SMALL, resumes=late, legend=False))
        )

    def curve(title: str, says: str, unit: str, values: list[float | None], **manner: bool) -> None:
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        if points:
            found.append(Picture(title, says, _curve(points, unit, **manner)))

    def by_layer(title: str, says: str, name: str) -> None:
        looked = [r for r in held_out if r.get(name)]
        if looked:
            found.append(Picture(title, says, _by_layer(looked, name)))

    def scaled(name: str, factor: float) -> list[float | None]:
        return [factor * r[name] if name in r else None for r in train]

    curve("Learning rate", "Of each step.", "learning rate", scaled("lr", 1), exact=True)
    curve("Gradient norm", "Before clipping.", "L2 norm", scaled("grad_norm", 1), large_range=True)
    says = "Tokens a second of each step, all devices together."
    curve("Throughput", says, "tokens/s", scaled("tokens_per_second", 1))
    if any("mfu" in r for r in train):
        says = "The model's FLOPs, as a share of what the devices can do at best."
        curve("MFU", says, "% of peak", scaled("mfu", 100))
    else:
        large = max(r.get("flops_per_second", 0) for r in train) >= 1e12
        unit, factor = ("TFLOP/s", 1e-12) if large else ("GFLOP/s", 1e-9)
        curve("Model FLOP/s", "The model's FLOPs a second.", unit, scaled("flops_per_second", factor))
    curve("Waiting for data", "Share of a step's time.", "% of the time", [_waiting(r) for r in train])
    curve("Memory", "The largest so far, of the first process.", "GiB", scaled("memory_bytes", 2**-30), exact=True)
    by_layer("Forgetting", "Mean of 1 − α: the share of a slot that a token lets go.", "forgetting")
    by_layer("Slot entropy", "1 where all slots are read alike, 0 where one is read alone.", "slot_entropy")
    by_layer("Dead slots", "Share that is hardly ever read.", "dead_slots")
    return found


def _waiting(record: dict[str, Any]) -> float | None:
    """The share of a step's time, in percent, that went by waiting for its batch."""
    if "data_seconds" not in record:
        return None
    tokens = record["tokens"] / record["step"]
    return 100 * record["data_seconds"] * record["tokens_per_second"] / tokens


def _loss(
    records: Records,
    *,
    size: tuple[float, float],
    title: str | None = None,
    resumes: Sequence[int] = (),
    legend: bool = True,
    dpi: int = 120,
) -> bytes:
    train, held_out = of_kind(records, "train"), of_kind(records, "eval")
    with _drawing(size, dpi) as (figure, axes, png):
        last = train[-1]
        steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
        for i, step in enumerate(resumes):
            axes.axvline(step, color=_RESUME, linewidth=1.0, linestyle=":", label=None if i else "resumed")
        _faint_and_smooth(axes, steps, losses, "training loss (moving average)")
        if spikes := of_kind(records, "spike"):
            where = [r["step"] for r in spikes], [r["loss"] for r in spikes]
            axes.plot(*where, color=_SPIKE, marker="v", markersize=5, linestyle="none", label="loss spike")
        axes.set_xlabel(f"step ({last['tokens'] / last['step']:,.0f} tokens each)")
        axes.set_ylabel("loss (nats per token)")
        if title:
            axes.set_title(title)
        if held_out:
            draw = _held_out_loss if "loss" in held_out[-1] else _held_out_accuracy
            draw(axes, held_out)
        if legend:
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return png.getvalue()


def _held_out_loss(axes: "Axes", held_out: Records) -> None:
    last = held_out[-1]
    _points(
        axes, held_out, "loss", f"held-out loss ({last['bits_per_byte']:.3f} bits per byte at step {last['step']:,})"
    )
    # Nats a token and bits a byte of one text differ by a constant factor.
    factor = last["bits_per_byte"] / last["loss"]
    right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
    right.set_ylabel("bits per byte of held-out text")


def _held_out_accuracy(axes: "Axes", held_out: Records) -> None:
    right = axes.twinx()
    right.set_ylim(-0.02, 1.02)
    right.set_ylabel("accuracy on held-out queries")
    last = held_out[-1]
    _points(right, held_out, "accuracy", f"held-out accuracy ({last['accuracy']:.3f} at step {last['step']:,})")


def _points(axes: "Axes", records: Records, name: str, label: str) -> None:
    steps, values = [r["step"] for r in records], [r[name] for r in records]
    axes.plot(steps, values, color=_HELD_OUT, marker="o", markersize=3, linewidth=1.5, label=label)


def _curve(points: list[tuple[int, float]], unit: str, *, large_range: bool = False, exact: bool = False) -> bytes:
    """A quantity over the steps: with its moving average, or, where it is `exact` and has no noise, as it is."""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    with _drawing(_SMALL, place=(0.14, 0.15, 0.83, 0.77)) as (_, axes, png):
        if exact:
            axes.plot(steps, values, color=_TRAIN, linewidth=1.5, marker=_alone(steps))
        else:
            _faint_and_smooth(axes, steps, values)
        low, high = min(values), max(values)
        if large_range and low > 0 and high > 20 * low:
            axes.set_yscale("log")
        elif high - low < 0.05 * abs(high):  # an even curve should look even
            axes.set_ylim(min(0, low), 1.15 * high)
        if axes.get_yscale() == "linear":
            _plain_numbers(axes.yaxis)
        axes.set_ylabel(unit)
        axes.set_xlabel("step")
    return png.getvalue()


def _by_layer(records: Records, name: str) -> bytes:
    from matplotlib import colormaps

    # Only the layers that have slots.
    layers = sorted(records[-1][name], key=int)
    steps = [r["step"] for r in records]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    with _drawing(_SMALL, place=(0.14, 0.15, 0.72, 0.77)) as (figure, axes, png):
        for layer, colour in zip(layers, colours, strict=True):
            values = [r[name].get(layer, np.nan) for r in records]
            axes.plot(steps, values, color=colour, linewidth=1.2, marker="o", markersize=2.5)
        high = max(max(r[name].values()) for r in records)
        axes.set_ylim(-0.02 * (high or 1), 1.05 * (high or 1))
        axes.set_xlabel("step")
        _layer_bar(figure.add_axes((0.89, 0.15, 0.03, 0.77)), layers, colours)
    return png.getvalue()


def _layer_bar(axes: "Axes", layers: list[str], colours: np.ndarray) -> None:
    """The colour of each layer, the first on top; of very many layers, every second (third, …) has its number."""
    axes.imshow(colours[:, None], aspect="auto")
    numbered = range(0, len(layers), -(-len(layers) // _LAYERS_NUMBERED))
    axes.set_yticks(numbered, [layers[i] for i in numbered], fontsize=7)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("layer", fontsize=8)


@contextmanager
def _drawing(
    size: tuple[float, float], dpi: int = 120, place: tuple[float, float, float, float] | None = None
) -> Iterator[tuple[Any, "Axes", io.BytesIO]]:
    """A figure with one pair of axes, and where its PNG is once the block ends.

    Finding the place of the axes takes half of the time; `place` gives it: left, bottom, width, height.
    """
    import matplotlib
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout=None if place else "constrained", dpi=dpi)
        axes = figure.add_axes(place) if place else figure.add_subplot()
        _plain_numbers(axes.xaxis)
        axes.grid(alpha=0.3)
        yield figure, axes, png
        figure.savefig(png, format="png")


def _plain_numbers(axis: Any) -> None:
    """Thousands with commas; a common factor at the end of the axis only where numbers are below a hundredth."""
    from matplotlib.ticker import ScalarFormatter, StrMethodFormatter

    if max(abs(end) for end in axis.get_view_interval()) < 0.01:
        small = ScalarFormatter(useMathText=True)
        small.set_powerlimits((-2, 3))
        axis.set_major_formatter(small)
    else:
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def _faint_and_smooth(axes: "Axes", steps: list[int], values: list[float], label: str | None = None) -> None:
    axes.plot(steps, values, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=_TRAIN, linewidth=1.5, marker=_alone(steps), label=label)


def _alone(steps: list[int]) -> str | None:
    """The marker of a curve: a single point would be invisible without one."""
    return "o" if len(steps) == 1 else None


def _smooth(values: list[float]) -> np.ndarray:
    """Mean of the values around each one, over about a fiftieth of the curve (less at its ends)."""
    reach = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    low, high = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def duration(seconds: float) -> str:
    """ "3 d 04 h", "2 h 05 min", "4 min 07 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
