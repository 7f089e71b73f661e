"""The folder of a run: may this recipe use it, and where does it go on from."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from flash_gsa.errors import UsageError
from flash_gsa.training.checkpoint import CHECKPOINTS, remove_leftovers
from flash_gsa.training.metrics import METRICS_FILE
from flash_gsa.training.recipe import Recipe
from flash_gsa.training.recipe_file import load_recipe, recipe_differences, recipe_to_yaml
from flash_gsa.training.starts import STARTS_FILE
from flash_gsa.training.trackers import TRACKERS_FILE

RECIPE_FILE = "recipe.yaml"
Existing = Literal["resume", "overwrite", "refuse"]

_OURS = (RECIPE_FILE, METRICS_FILE, "tensorboard", CHECKPOINTS, "loss.png", "report.html", STARTS_FILE, TRACKERS_FILE)
# Nor can the number of processes and how they share the work, but for the order in which sums are taken.
_MAY_DIFFER: tuple[str, ...] = (  # a section ends with a dot
    "description",
    "output_dir",
    "device",
    "data.cache_dir",
    "data.source",  # a checkpoint knows its texts by their contents, and refuses others
    "data.verify",
    "checkpoints.",
    "logging.",
)
_MAY_DIFFER += ("engine.", "batch.micro_rows")
_MAY_DIFFER += ("model.states",)  # the same bits


def run_dir_of(recipe: Recipe) -> Path:
    """The folder of a recipe's run: its `output_dir`, or runs/<name>."""
    return Path(recipe.output_dir or f"runs/{recipe.name}")


@contextmanager
def open_run_folder(recipe: Recipe, existing: Existing) -> Iterator[Path]:
    """Makes or opens the run's folder, writes recipe.yaml, and holds the folder for this process.

    Args:
        existing: what to do if a run is there. "resume": go on if its recipe is the same (values that cannot
            change the result may differ); "overwrite": delete that run's files first; "refuse": raise.

    Raises:
        UsageError: the folder belongs to another recipe, holds something else, is in use, or cannot be written.
    """
    run_dir = run_dir_of(recipe)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The run's folder {run_dir} cannot be made: {error}. Set output_dir.") from None
    with _held(run_dir):
        # Without a checkpoint there is nothing to lose or to go on with: a mended recipe starts anew.
        present = any((run_dir / CHECKPOINTS).glob("step-*"))
        if existing == "overwrite":
            _delete_run(run_dir)
        elif not (run_dir / RECIPE_FILE).exists() and any((run_dir / name).exists() for name in _OURS):
            raise UsageError(
                f"{run_dir} holds files of a run but no {RECIPE_FILE}, so it cannot be told whether it is "
                "this one. Set output_dir to another folder, or move those files away."
            )
        elif present and existing == "refuse":
            raise UsageError(f"{run_dir} already holds a run. Set output_dir to another folder, or allow resuming it.")
        elif present:
            _same_recipe(recipe, run_dir)
        remove_leftovers(run_dir)
        aside = run_dir / f".{RECIPE_FILE}.tmp"
        aside.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        aside.replace(run_dir / RECIPE_FILE)
        yield run_dir


def _same_recipe(recipe: Recipe, run_dir: Path) -> None:
    path = run_dir / RECIPE_FILE
    old = load_recipe(path)
    changed = {k: v for k, v in recipe_differences(old, recipe).items() if not _may_differ(k)}
    if changed:
        lines = "".join(
            f"\n  - {key}: {_told(before)} there, {_told(now)} now" for key, (before, now) in changed.items()
        )
        raise UsageError(
            f"{run_dir} holds a run of another recipe:{lines}\n"
            "Give the values it had to go on with it, set output_dir (or name) for a new run, or overwrite it "
            "(--fresh)."
        )


def _told(value: object) -> str:
    return "not given" if value is None else repr(value)


def _may_differ(key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in _MAY_DIFFER)


def _delete_run(run_dir: Path) -> None:
    for name in _OURS:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of the folder; the system lets go of it when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        yield
        return
    try:
        handle = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"The run's folder {run_dir} cannot be written to: {error}. Set output_dir.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another process is training in {run_dir}. Wait for it, stop it, or set output_dir."
            ) from None
        yield
    finally:
        os.close(handle)
