"""Pictures of the training benchmark: tokens a second and peak memory against the length of sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .train_report import named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

COLOURS = {"ours": "tab:blue", "fla": "tab:orange", "llama": "tab:green"}
LINES = {"plain": ("-", "o"), "compiled": ("--", "s"), "graph": (":", "^"), "linear-loss": ("--", "D")}


def draw(result: Record, folder: Path) -> list[Path]:
    """Draws what a result has figures for: train_gpu-speed.png and train_gpu-memory.png (or train_cpu-…).

    Args:
        result: of `train.benchmark`, or read from its file.
        folder: made if need be.

    Returns:
        The paths of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = [record for record in result["steps"] if not record["problem"]]
    with_memory = [record for record in steps if "peak_bytes" in record]
    pictures = {
        "speed": (steps, lambda r: r["tokens_per_second"] / 1e3, "thousand tokens a second", "Training speed"),
        "memory": (with_memory, lambda r: r["peak_bytes"] / 2**30, "GiB", "Peak memory of training"),
    }
    paths = []
    for name, (records, height, unit, title) in pictures.items():
        if records:
            paths.append(folder / f"train_{result['suite']}-{name}.png")
            _figure(result, records, height, unit, title).savefig(paths[-1], dpi=150)
    return paths


def _figure(
    result: Record, records: list[Record], height: Callable[[Record], float], unit: str, title: str
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for who in dict.fromkeys((r["implementation"], r["variant"]) for r in records):
        mine = sorted((r for r in records if (r["implementation"], r["variant"]) == who), key=lambda r: r["length"])
        line, marker = LINES[who[1]]
        style: dict[str, Any] = {"color": COLOURS[who[0]], "linestyle": line, "marker": marker, "markersize": 4}
        axes.plot([r["length"] for r in mine], [height(r) for r in mine], label=named(mine[0]), **style)
    lengths = sorted({r["length"] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{T // 1024}K" if T >= 1024 else str(T) for T in lengths])
    axes.minorticks_off()
    axes.set_xlabel("sequence length in tokens")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    about = result["about"]
    where = f"{about['device']}, torch {about['versions']['torch']}, {about['date'][:10]}"
    what = f"{result['size']['name']}, {result['tokens']:,} tokens a step, {result['precision']}"
    options = {"ncols": 3, "fontsize": 9, "title": f"{what} · {where}", "title_fontsize": 8, "frameon": False}
    figure.legend(loc="outside lower center", **options).get_title().set_color("dimgray")
    figure.suptitle(title, fontsize=12)
    return figure
