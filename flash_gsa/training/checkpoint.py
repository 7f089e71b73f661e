"""Checkpoints: folders that are either complete and proven, or not there.

    checkpoints/step-00000500/
      config.json model.safetensors tokenizer.json …   a Hugging Face folder
      trainer.safetensors     optimiser moments, random states
      trainer.json            {"format": 1, "step": 500, …what the trainer needs to go on}
      manifest.json           {"format": 1, "step": 500, "files": {name: {"sha256": hex, "bytes": n}}}

A checkpoint is written into `.writing-step-00000500`, every file is flushed to the disk, the manifest is
written last, and the folder is renamed. A process killed at any moment leaves the older checkpoints as they
were, and at most a hidden folder that the next run removes. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_gsa.errors import UsageError

FORMAT = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STATE = "trainer.json"
TENSORS = "trainer.safetensors"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` is its trainer.json, `tensors` its trainer.safetensors (on the CPU)."""

    folder: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `checkpoints/step-{step:08d}`, then deletes all but the `keep` newest checkpoints.

    Args:
        write_model: writes the Hugging Face folder (model, configuration, tokenizer) into a path.
        tensors: what goes to trainer.safetensors; any device, any dtype.
        state: what goes to trainer.json, beside `format` and `step`.

    Returns:
        The checkpoint's folder.

    Raises:
        UsageError: the disk is full or cannot be written; the older checkpoints are untouched.
    """
    parent = run_dir / CHECKPOINTS
    final = parent / f"step-{step:08d}"
    writing = parent / f".writing-{final.name}"
    with disk_errors(f"The checkpoint of step {step} could not be written to {parent}", run_dir):
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            write_model(writing)
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, writing / TENSORS)
            _write_json(writing / STATE, {"format": FORMAT, "step": step, **state})
            files = {str(p.relative_to(writing)): p for p in sorted(writing.rglob("*")) if p.is_file()}
            listed = {name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for name, p in files.items()}
            for path in files.values():
                _flush(path)
            _write_json(writing / MANIFEST, {"format": FORMAT, "step": step, "files": listed})
            _flush(writing / MANIFEST)
            _flush(writing)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        if final.exists():
            _remove(final)
        writing.rename(final)
        _flush(parent)
    for _, older in _folders(run_dir)[:-keep]:
        _remove(older)
    return final


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified and read; None if the run has not written one.

    Raises:
        UsageError: the newest one is damaged. It is not passed over silently, because going on from an
            older one loses work.
    """
    folders = _folders(run_dir)
    return load_checkpoint(folders[-1][1]) if folders else None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verifies every file of a checkpoint and reads what the trainer needs.

    Raises:
        UsageError: a file is missing, cut short, changed, or of a format this version does not know.
    """
    verify_checkpoint(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, state["step"], state, load_file(folder / TENSORS))


def verify_checkpoint(folder: Path, *, model_only: bool = False) -> None:
    """Compares every file with the manifest: presence, size, sha256.

    Args:
        model_only: leave out the trainer's own files, which loading a model does not read.

    Raises:
        UsageError: names the first file that differs, how, and what to do.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise _damaged(folder, f"{MANIFEST} is missing, so it cannot be told whether the rest is complete")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known, files = manifest["format"] == FORMAT, dict(manifest["files"])
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from None
    if not known:
        raise UsageError(
            f"{folder} has format {manifest['format']}, and this version of flash-gsa reads format {FORMAT}. "
            "Use the version that wrote it."
        )
    for name, (size, digest) in expected.items():
        file = folder / name
        if model_only and name in (STATE, TENSORS):
            continue
        if not file.is_file():
            raise _damaged(folder, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(folder, f"{name} has {file.stat().st_size:,} bytes where {size:,} were written")
        if _sha256(file) != digest:
            raise _damaged(folder, f"the contents of {name} have changed since it was written (sha256 differs)")


def resolve_model_folder(path: str | Path) -> Path:
    """The Hugging Face folder meant by `path`: a run (its newest checkpoint), a checkpoint, or such a folder.

    A folder with a manifest is verified first.

    Raises:
        UsageError: there is nothing to load at `path`, or it is damaged, or its weights are pickled.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: expected a run, a checkpoint, or a saved model's folder")
    if path.name == CHECKPOINTS and not (path / "config.json").exists():
        path = path.parent
    if (path / CHECKPOINTS).is_dir():
        folders = _folders(path)
        if not folders:
            raise UsageError(f"The run in {path} has not written a checkpoint yet. Let it train on, then try again.")
        path = folders[-1][1]
    if (path / MANIFEST).is_file() or _STEP_FOLDER.fullmatch(path.name):
        verify_checkpoint(path, model_only=True)
        return path
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{path} holds no model: there is neither a checkpoints folder nor a config.json. Expected a "
            "run (runs/…), a checkpoint (runs/…/checkpoints/step-…) or a folder made by save_pretrained."
        )
    if not any(path.glob("*.safetensors")):
        raise UsageError(
            f"{path} holds no .safetensors file. Pickled weights (.bin, .pt) are never loaded, because they "
            "can run any program; convert them to safetensors with the software that wrote them."
        )
    return path


def remove_leftovers(run_dir: Path) -> None:
    """Deletes what a killed process left half-written or half-deleted."""
    for folder in (run_dir / CHECKPOINTS).glob(".*-step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def check_space(run_dir: Path, needed: int) -> None:
    """Raises UsageError if fewer than `needed` bytes are free where `run_dir` lies."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UsageError(
            f"{run_dir} has {_size(free)} free, and the checkpoints of this run need {_size(needed)}. "
            "Free some space, lower checkpoints.keep, or set output_dir to another disk."
        )


@contextmanager
def disk_errors(what: str, run_dir: Path) -> Iterator[None]:
    """Turns a failure to write into a UsageError that says `what` failed, why, and what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):
            reason = "no space is left on the disk"
            cure = "Free some space and run the same command again to go on."
        else:
            reason = str(error)
            cure = "Mend that, and run the same command again to go on."
        folders = _folders(run_dir)
        safe = f"{folders[-1][1]} is complete." if folders else "No checkpoint has been written yet."
        raise UsageError(f"{what}: {reason}. {safe} {cure}") from error


def _folders(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    found = [(_STEP_FOLDER.fullmatch(p.name), p) for p in (run_dir / CHECKPOINTS).glob("step-*")]
    return sorted((int(match[1]), p) for match, p in found if match)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a half-deleted one never passes for a damaged one."""
    aside = folder.with_name(f".deleting-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _damaged(folder: Path, how: str) -> UsageError:
    others = [p for _, p in _folders(folder.parent.parent) if p != folder]
    if others:
        cure = f"Delete that folder to go on from {others[-1].name}, or restore it from a copy."
    else:
        cure = "There is no other checkpoint beside it: restore it from a copy, or start the run again."
    return UsageError(f"The checkpoint {folder} is damaged: {how}. {cure}")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    with suppress(PermissionError):  # Windows cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)
