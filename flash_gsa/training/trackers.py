"""Who else is told a run's figures: TensorBoard, trackio, Weights & Biases, as `logging.trackers` names them.

metrics.jsonl is the record of a run; what is here shows the same figures elsewhere, under names like train/loss,
eval/by_source/books and eval/dead_slots/3. A resumed run goes on under its old name: the name ends in an id that
`trackers.json` in the run's folder keeps.
"""

import json
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flash_gsa.errors import UsageError
from flash_gsa.training.recipe import Recipe

TRACKERS_FILE = "trackers.json"


class Tracker(Protocol):
    """Shows records of metrics.jsonl somewhere."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Shows one record."""

    def flush(self) -> None:
        """Waits until what was written is safe, where that is on this machine."""

    def close(self) -> None:
        """Ends the run there."""


def check_trackers(names: Sequence[str]) -> None:
    """Are the packages installed? Asked before data are prepared, which may take hours.

    Raises:
        UsageError: one is not, with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"logging.trackers names {name}, which is not installed. Install it with: "
                f'pip install "flash-gsa[{name}]", or leave it out, as in logging.trackers=[]'
            )


def start_trackers(
    recipe: Recipe, run_dir: Path, *, resume_step: int | None, shown: Iterable[Mapping[str, Any]] = ()
) -> list[Tracker]:
    """The trackers that the recipe names, ready for records.

    Args:
        resume_step: the step the run goes on from; None: it begins anew, and so it does at the trackers.
        shown: the records that were written before the run was resumed, also those of steps that will be taken
            again. TensorBoard forgets those steps; trackio and wandb cannot, so they are not told them twice.

    Raises:
        UsageError: one is not installed, or cannot begin (no login, no network).
    """
    names = recipe.logging.trackers
    check_trackers(names)
    last = {record["kind"]: record["step"] for record in shown}
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(_TensorBoard(run_dir / "tensorboard", resume_step))
        else:
            _begin(name, recipe, run_dir, _run_id(run_dir, resume_step))
            trackers.append(_Remote(name, last))
    return trackers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name: {"train/loss": …, "eval/by_source/books": …}."""
    kind = record["kind"]
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, Mapping):
            found |= {f"{kind}/{name}/{part}": float(v) for part, v in value.items()}
        elif value is not None:
            found[f"{kind}/{name}"] = float(value)
    return found


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._board = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Remote:
    """The current run of trackio or wandb, which have the same interface. If it fails, training goes on without it."""

    def __init__(self, name: str, last: Mapping[str, int]) -> None:
        self._name, self._last = name, last
        self._package: Any = import_module(name)

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] > self._last.get(record["kind"], -1):
            self._try("log", scalars(record), step=record["step"])

    def flush(self) -> None:
        """Both send in the background."""

    def close(self) -> None:
        self._try("finish")

    def _try(self, what: str, *arguments: Any, **named: Any) -> None:
        if self._package is None:
            return
        try:
            getattr(self._package, what)(*arguments, **named)
        except Exception as error:
            self._package = None
            warnings.warn(f"{self._name} failed and is told no more: {error}", stacklevel=2)


def _begin(name: str, recipe: Recipe, run_dir: Path, run_id: str) -> None:
    package = import_module(name)
    common = {
        "project": recipe.logging.project,
        "name": f"{run_dir.name}-{run_id}",
        "config": recipe.model_dump(),
        "resume": "allow",
    }
    # trackio knows a run by its name, wandb by an id of its own.
    own = {"id": run_id} if name == "wandb" else {}
    try:
        package.init(**common, **own)
    except Exception as error:
        raise UsageError(
            f"{name} could not begin a run: {error} Put that right, or leave it out, as in logging.trackers=[]"
        ) from None


def _run_id(run_dir: Path, resume_step: int | None) -> str:
    path = run_dir / TRACKERS_FILE
    if resume_step is None or not path.exists():
        path.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["id"]
