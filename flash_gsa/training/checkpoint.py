"""Checkpoints: folders that are either complete and proven, or not there.

    checkpoints/step-00000500/
      config.json tokenizer.json …   a Hugging Face folder
      model.safetensors              weights, where processes have whole ones
      trainer.safetensors            optimiser moments, random states
      shards/00003-of-00008.safetensors   where they have rows of them: both, each process its rows
      trainer.json                   {"format": 2, "step": 500, …what the trainer needs to go on}
      manifest.json                  {"format": 2, "step": 500, "files": {name: {"sha256": hex, "bytes": n}}}

A checkpoint is written into `.writing-step-00000500`, every file is flushed to the disk, the manifest is
written last, and the folder is renamed. A process killed at any moment leaves the older checkpoints as they
were, and at most a hidden folder that the next run removes. Nothing is pickled.

Several processes need a folder that all of them see. Each writes its own file and, when it is on the disk, a small
one with its checksum; the main process waits for those. So the writing goes on beside the training, without any
communication between the processes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.training.engine import Piece
from flash_gsa.training.errors import NotWritten

FORMAT = 2
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STATE = "trainer.json"
TENSORS = "trainer.safetensors"
MODEL = "model.safetensors"
SHARDS = "shards"

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_ROWS = "rows"  # in the header of a shard: {name: [first row, rows in all]}
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass
class Checkpoint:
    """A verified checkpoint: `state` is its trainer.json; `read` gives its tensors by name.

    Names are `model/<weight>`, `optimizer/<state>/<weight>`, `random/<device>`.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    _places: dict[str, list[tuple[int, Any, str]]] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for path in _tensor_files(self.folder):
            file: Any = safe_open(path, "pt")
            rows = json.loads((file.metadata() or {}).get(_ROWS, "{}"))
            for key in file.keys():  # noqa: SIM118  (no mapping)
                name = f"model/{key}" if path.name == MODEL else key
                self._places.setdefault(name, []).append((rows.get(key, (0, None))[0], file, key))

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor, on the CPU, from whatever files they lie in; with None all of it.

        Raises:
            UsageError: the checkpoint has no such tensor.
        """
        if name not in self._places:
            raise UsageError(f"the checkpoint {self.folder} holds no {name}; it is not one of this model")
        places = sorted(self._places[name], key=lambda place: place[0])
        if stop is None and len(places) == 1:
            return places[0][1].get_tensor(places[0][2])
        found = []
        for first, file, key in places:
            part = file.get_slice(key)
            last = first + part.get_shape()[0]
            low, high = max(start, first), last if stop is None else min(stop, last)
            if low < high:
                found.append(part[low - first : high - first])
        return found[0] if len(found) == 1 else torch.cat(found)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    pieces: Mapping[str, Piece],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
    sharded: bool = False,
    rank: int = 0,
    ranks: int = 1,
    patience: float = 600.0,
) -> Path:
    """Writes `checkpoints/step-{step:08d}`, then deletes all but the `keep` newest checkpoints and those whose step is
    a multiple of `keep_every`.

    `begin_checkpoint` comes first, in the main process. Where tensors are `sharded` every process calls this one, else
    only the main process does.

    Args:
        write_model: writes configuration and tokenizer into a path.
        pieces: this process's part of the tensors, on the CPU; names as in `Checkpoint`.
        state: what goes to trainer.json, beside `format` and `step`.
        patience: seconds in which the main process sees nothing of what others are to write before it gives up.

    Returns:
        The checkpoint's folder; in the main process it is complete.

    Raises:
        UsageError: the disk is full or cannot be written, or another process does not write its part; the older
            checkpoints are untouched.
    """
    final = checkpoint_folder(run_dir, step)
    parent, writing = final.parent, _writing(final)
    with disk_errors(f"The checkpoint of step {step} could not be written to {parent}", run_dir):
        try:
            if sharded:
                _write_shard(writing, pieces, rank, ranks)
            if rank > 0:
                return final
            if not sharded:
                _write_whole(writing, pieces)
            write_model(writing)
            _write_json(writing / STATE, {"format": FORMAT, "step": step, **state})
            listed = _others_shards(writing, ranks, patience) if sharded else {}
            for path in sorted(writing.rglob("*")):
                name = path.relative_to(writing).as_posix()
                if path.is_file() and name not in listed:
                    listed[name] = _listed(path)
            _write_json(writing / MANIFEST, {"format": FORMAT, "step": step, "files": dict(sorted(listed.items()))})
            _flush(writing / MANIFEST)
            _flush(writing)
        except BaseException as error:
            if rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            else:
                with suppress(OSError):  # the disk may not take even this
                    (_shard(writing, rank, ranks).with_suffix(".failed")).write_text(str(error), encoding="utf-8")
            raise
        if final.exists():
            _remove(final)
        writing.rename(final)
        _flush(parent)
    for number, older in _folders(run_dir)[:-keep]:
        if keep_every is None or number % keep_every:
            _remove(older)
    return final


def begin_checkpoint(run_dir: Path, step: int) -> None:
    """Makes the empty folder that `save_checkpoint` of every process then writes into.

    Raises:
        UsageError: it cannot be made.
    """
    writing = _writing(checkpoint_folder(run_dir, step))
    with disk_errors(f"The checkpoint of step {step} could not be begun", run_dir):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)


class BackgroundWriter:
    """Calls one function at a time in a thread; what it raises is raised here, by `poll` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._result: Any = None

    def start(self, function: Callable[[], Any]) -> None:
        """Lets `function` begin; the one before has been waited for."""
        assert self._thread is None, "wait for the one before first"

        def work() -> None:
            try:
                self._result = function()
            except BaseException as error:
                self._error = error

        # A daemon: a process that ends early does not wait for it, and leaves a hidden folder behind.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Any:
        """What the function returned, once; None while it works, or if there is none."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Any:
        """What the function returned, when it is done; None if there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None if the run has not written one.

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
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that has been verified before, by another process."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, state["step"], state)


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
            "Free some space, keep fewer (checkpoints.keep, checkpoints.keep_every), or set output_dir to another disk."
        )


@contextmanager
def disk_errors(what: str, run_dir: Path) -> Iterator[None]:
    """Turns a failure to write into a NotWritten that says `what` failed, why, and what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):
            reason = "no space is left on the disk"
            cure = "Free some space"
        else:
            reason = str(error)
            cure = "Mend that"
        folders = _folders(run_dir)
        safe = f"{folders[-1][1]} is complete." if folders else "No checkpoint has been written yet."
        cure += f", and run the same command again {'to go on' if folders else 'to start anew'}."
        raise NotWritten(f"{what}: {reason}. {safe} {cure}") from error


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


def _writing(final: Path) -> Path:
    return final.with_name(f".writing-{final.name}")


def _tensor_files(folder: Path) -> list[Path]:
    whole = [folder / name for name in (MODEL, TENSORS) if (folder / name).is_file()]
    return whole + sorted((folder / SHARDS).glob("*.safetensors"))


def _write_whole(writing: Path, pieces: Mapping[str, Piece]) -> None:
    model = {name.removeprefix("model/"): p.tensor for name, p in pieces.items() if name.startswith("model/")}
    rest = {name: p.tensor for name, p in pieces.items() if not name.startswith("model/")}
    save_tensors(model, writing / MODEL, {"format": "pt"})  # which transformers asks for
    save_tensors(rest, writing / TENSORS)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that whoever may read other new files here may read: the library's own are their owner's."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _shard(writing: Path, rank: int, ranks: int) -> Path:
    return writing / SHARDS / f"{rank:05d}-of-{ranks:05d}.safetensors"


def _write_shard(writing: Path, pieces: Mapping[str, Piece], rank: int, ranks: int) -> None:
    path = _shard(writing, rank, ranks)
    path.parent.mkdir(exist_ok=True)
    rows = {name: [p.start, p.rows] for name, p in pieces.items()}
    save_tensors({name: p.tensor for name, p in pieces.items()}, path, {_ROWS: json.dumps(rows)})
    aside = path.with_suffix(".unfinished")
    _write_json(aside, _listed(path))
    aside.replace(path.with_suffix(".json"))


def _others_shards(writing: Path, ranks: int, patience: float) -> dict[str, dict[str, Any]]:
    """Waits until every process has written its shard; their sizes and checksums.

    Raises:
        OSError: a process could not, or nothing was written for `patience` seconds: who has died tells nobody.
    """
    found: dict[str, dict[str, Any]] = {}
    seen, since = None, time.monotonic()
    for rank in range(ranks):
        path = _shard(writing, rank, ranks).with_suffix(".json")
        while not path.exists():
            if (failed := path.with_suffix(".failed")).exists():
                raise OSError(f"process {rank} could not write its part: {failed.read_text(encoding='utf-8')}")
            if (now := _sizes(path.parent)) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise OSError(
                    f"process {rank} has not written its part, and nothing came of it for {patience:g} s "
                    "(engine.timeout); it has ended or hangs"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        found[f"{SHARDS}/{path.stem}.safetensors"] = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        since = time.monotonic()
    return found


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed meanwhile
            sizes[path.name] = path.stat().st_size
    return sizes


def _listed(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk then."""
    _flush(path)
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


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
