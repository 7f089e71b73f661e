"""What `flash-gsa train --dry-run` prints, and what it refuses."""

import os
import re
from typing import TYPE_CHECKING

from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from flash_gsa.training.dry_run import DryRun

_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}
REFERENCE = "H100"
"""The GPU whose peak the time is told for where there is none, or one that is not known."""


def show_dry_run(recipe: str, overrides: list[str], processes: int | None, device_memory: str | None) -> None:
    """Print the table; raise UsageError if the run does not fit."""
    from flash_gsa.training.dry_run import check_fits, dry_run
    from flash_gsa.training.recipe_file import load_recipe

    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes < 1:
        raise UsageError(f"--processes {processes}: expected a whole number of 1 or more")
    memory = None if device_memory is None else memory_bytes(device_memory)
    name, present = _device()
    loaded = load_recipe(recipe, overrides, data_named=False)
    run = dry_run(loaded, processes)
    if int(os.environ.get("RANK", 0)) == 0:
        _print(run, memory or present, name)
    if (limit := memory or present) is not None:
        check_fits(loaded, processes, limit, run.size)


def memory_bytes(text: str) -> int:
    """`80GiB` in bytes. Raises UsageError if it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].lower() not in _UNITS or not float(found[1]):
        raise UsageError(f"--device-memory {text!r} is no size: expected a number with GiB or GB, for instance 80GiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _device() -> tuple[str | None, int | None]:
    """Name and bytes of the GPU here."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    about = torch.cuda.get_device_properties(0)
    return about.name, about.total_memory


def _print(run: "DryRun", limit: int | None, gpu: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for line in [*_work(run), ("", "", ""), *_time(run, gpu), ("", "", ""), *_memory(run, limit)]:
        table.add_row(*line)
    console = Console()
    # Where there is no terminal, there is no width to break lines for.
    (console if console.is_terminal else Console(width=160)).print(table)


def _started_by(run: "DryRun") -> list[tuple[str, str, str]]:
    """What to know of an engine of several processes where one was asked for."""
    if run.recipe.engine.kind == "single" or run.processes > 1:
        return []
    return [("", "", "a launcher starts its processes (torchrun --nproc-per-node N …); --processes N counts for N")]


def _work(run: "DryRun") -> list[tuple[str, str, str]]:
    size, batch, engine = run.size, run.recipe.batch, run.recipe.engine
    processes = f"{run.processes} process{'es' if run.processes > 1 else ''}"
    steps = "the time decides" if run.steps is None else f"{run.steps:,}"
    lines = [
        ("recipe", run.recipe.name, f"{processes}, engine {engine.kind}, precision {run.recipe.precision}"),
        *_started_by(run),
        ("parameters", f"{size.parameters:,}", f"{size.parameters - size.embeddings:,} without embeddings"),
        ("vocabulary", f"{size.vocabulary:,}", ""),
        ("FLOPs a token", f"{size.flops:.3g}", f"forward {size.flops / 3:.3g}, backward {2 * size.flops / 3:.3g}"),
        ("tokens a step", f"{batch.tokens:,}", f"{batch.rows} rows of {batch.length}"),
        (
            "a process, a step",
            f"{run.micro_batches} × {run.micro_rows} rows",
            f"micro-batches of {run.micro_rows * batch.length // engine.context:,} tokens",
        ),
        ("steps", steps, f"{run.warmup_steps:,} of them warm-up"),
    ]
    if run.tokens is not None:
        lines.append(("tokens", f"{run.tokens:,}", ""))
        lines.append(("FLOPs", f"{run.flops:.3g}", "of the model"))
    return lines


def _time(run: "DryRun", gpu: str | None) -> list[tuple[str, str, str]]:
    from flash_gsa.training.dry_run import ASSUMED_SHARE, duration, peak_flops

    known = gpu if gpu is not None and peak_flops(gpu) else REFERENCE
    peak = peak_flops(known)
    assert peak is not None
    assumed = f"on {run.processes} × {known}, at {ASSUMED_SHARE:.0%} of its {peak / 1e12:.0f} TFLOP/s: assumed"
    if run.flops is None:
        return [("time", f"{run.recipe.schedule.minutes:g} min", "as the recipe says")]
    return [("time", duration(run.seconds(ASSUMED_SHARE * peak) or 0), assumed)]


def _memory(run: "DryRun", limit: int | None) -> list[tuple[str, str, str]]:
    from flash_gsa.training.estimate import GIB

    names = {
        "weights": "weights",
        "moments": "moments",
        "gradients": "gradients",
        "gathered": "gathered, in buckets",
        "working": "activations, work space",
        "outside": "CUDA and its libraries",
    }
    lines = [(said, f"{getattr(run.memory, name) / GIB:.2f} GiB", "") for name, said in names.items()]
    lines[0] = (*lines[0][:2], "a process, at the worst moment of a step, on a GPU")
    said = "no GPU here and no --device-memory: not judged"
    if limit is not None:
        said = f"of {limit / GIB:.1f} GiB"
    return [*lines, ("together", f"{run.memory.total / GIB:.2f} GiB", said)]
