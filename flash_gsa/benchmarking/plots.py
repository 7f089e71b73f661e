"""Pictures of a result: time and memory against length, and how many times faster than the others."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .report import named, peak, ran, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = dict[str, Any]

STYLES = {
    "auto": ("tab:blue", "o"),
    "fla": ("tab:orange", "D"),
    "sdpa-cudnn": ("tab:green", "s"),
    "sdpa-flash": ("tab:olive", "^"),
    "reference": ("tab:gray", "v"),
}
"""Colour and marker of an implementation; in this order."""
OTHERS = (("tab:red", "P"), ("tab:purple", "X"), ("tab:brown", "*"))


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what a result has figures for: op_gpu-time.png, op_gpu-memory.png, op_gpu-speedup.png (or op_cpu-…).

    Args:
        result: of `op.benchmark`, or read from its file.
        folder: made if need be.

    Returns:
        The paths of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"time": _time(result), "memory": _memory(result), "speedup": _speedup(result)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"op_{result['suite']}-{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _time(result: dict[str, Any]) -> "Figure | None":
    one = [r for r in _timed(result, "lengths") if r["shape"]["B"] == 1]
    tokens = result["constant_tokens"]
    many = [r for r in _timed(result, "lengths") if r["shape"]["B"] * r["shape"]["T"] == tokens]
    if not one:
        return None
    figure = _figure(9.0, 4.2)
    left, right = figure.subplots(1, 2)
    _lines(left, one, lambda r: 1e3 * r["forward_backward"]["seconds"])
    left.set_ylabel("milliseconds")
    left.set_title("one sequence", fontsize=11)
    fastest = max((tokens / r["forward_backward"]["seconds"] for r in many), default=1.0)
    unit, word = (1e6, "million") if fastest >= 1e6 else (1e3, "thousand")
    _lines(right, many, lambda r: tokens / r["forward_backward"]["seconds"] / unit)
    right.set_ylabel(f"{word} tokens a second")
    right.set_title(f"{tokens:,} tokens, cut into sequences", fontsize=11)
    return _finished(figure, left, "Forward and backward against the length", f"{_sizes(one[0])} · {_where(result)}")


def _memory(result: dict[str, Any]) -> "Figure | None":
    records = [r for r in _timed(result, "lengths") if r["shape"]["B"] == 1 and peak(r["forward_backward"]) is not None]
    if not records:
        return None
    figure = _figure(6.5, 4.2)
    axes = figure.add_subplot()
    _lines(axes, records, lambda r: peak(r["forward_backward"]))
    axes.set_ylabel("MiB above the inputs")
    about = f"{_sizes(records[0])} · {_where(result)}"
    return _finished(figure, axes, "Peak memory of forward and backward, one sequence", about)


def _speedup(result: dict[str, Any]) -> "Figure | None":
    own = {r["shape"]["label"]: r for r in _timed(result, "shapes") if r["implementation"] == "auto"}
    others = {
        (r["implementation"], r["shape"]["label"]): r
        for r in ran(result["shapes"])
        if r["shape"]["label"] in own and r["implementation"] in STYLES and r["implementation"] != "auto"
    }
    if not others:
        return None
    names = [name for name in STYLES if any(name == other for other, _ in others)]
    labels = list(dict.fromkeys(label for _, label in others))
    height = 0.8 / len(names)
    figure = _figure(9.0, 1.5 + (0.24 * len(names) + 0.1) * len(labels))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for (name, label), record in others.items():
        place = labels.index(label) + (names.index(name) - (len(names) - 1) / 2) * height
        ratio, said = 1.0, verdict(record)
        if not said:
            ratio = record["forward_backward"]["seconds"] / own[label]["forward_backward"]["seconds"]
            said = f"{ratio:.2g}×" if ratio < 1 else f"{ratio:.1f}×" if ratio < 20 else f"{ratio:.0f}×"
        axes.barh(place, ratio - 1, 0.9 * height, left=1, color=STYLES[name][0])
        away, side = (4, "left") if ratio >= 1 else (-4, "right")
        at = (ratio, place)
        axes.annotate(said, at, (away, 0), textcoords="offset points", va="center", ha=side, fontsize=9)
    for name in names:
        known = next(record for (other, _), record in others.items() if other == name)
        axes.barh(0, 0, left=1, color=STYLES[name][0], label=f"than {named(known)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(1, color="black", linewidth=0.8)
    _plain(axes.xaxis, "{x:g}")
    axes.set_xlabel("times faster, forward and backward")
    backends = dict.fromkeys(named(record) for record in own.values())
    title = f"How many times faster {', '.join(backends)} is"
    return _finished(figure, axes, title, _where(result), grid="x")


def _timed(result: dict[str, Any], part: str) -> list[Record]:
    return [record for record in result[part] if not record["problem"]]


def _lines(axes: "Axes", records: list[Record], height: Callable[[Record], float | None]) -> None:
    there = dict.fromkeys(r["implementation"] for r in records)
    others = dict(zip((name for name in there if name not in STYLES), OTHERS, strict=False))
    for name, (colour, marker) in (STYLES | others).items():
        mine = [r for r in records if r["implementation"] == name]
        points = sorted((r["shape"]["T"], height(r)) for r in mine)
        if points:
            places, heights = zip(*points, strict=True)
            axes.plot(places, heights, color=colour, marker=marker, markersize=4, label=named(mine[0]))
    lengths = sorted({r["shape"]["T"] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{T // 1024}K" if T >= 1024 else str(T) for T in lengths], fontsize=8)
    axes.set_xlabel("sequence length in tokens")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    _plain(axes.yaxis, "{x:,g}", steps=(1, 2, 5) if high < 300 * low else (1,))


def _plain(axis: "Axis", form: str, steps: tuple[int, ...] = (1, 2, 5)) -> None:
    """Numbers instead of powers, at `steps` of each power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(StrMethodFormatter(form))
    axis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _finished(
    figure: "Figure", labelled: "Axes", title: str, below: str, grid: Literal["both", "x"] = "both"
) -> "Figure":
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis=grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = labelled.get_legend_handles_labels()
    columns = {"ncols": len(labels), "fontsize": 9, "title": below, "title_fontsize": 8, "frameon": False}
    legend = figure.legend(handles, labels, loc="outside lower center", **columns)
    legend.get_title().set_color("dimgray")
    figure.suptitle(title, fontsize=12)
    return figure


def _where(result: dict[str, Any]) -> str:
    about = result["about"]
    return f"{about['device']}, torch {about['versions']['torch']}, {about['date'][:10]}"


def _sizes(record: Record) -> str:
    s = record["shape"]
    heads = f"{s['H']} heads" if s["H"] == s["HQ"] else f"{s['HQ']} query heads, {s['H']} heads"
    return f"{heads}, K = V = {s['K']}, {s['M']} slots, {record['dtype']}"
