"""A checkpoint as a model: loaded, or written as a Hugging Face folder. Needs no GPU and no other process."""

import json
from pathlib import Path

import torch

from flash_gsa.errors import UsageError
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.training.checkpoint import MANIFEST, SHARDS, open_checkpoint, resolve_model_folder
from flash_gsa.training.metrics import METRICS_FILE
from flash_gsa.training.run_folder import RECIPE_FILE


def load_model(path: str | Path) -> GSAForCausalLM:
    """The model of a run (its newest checkpoint), a checkpoint, or a saved model's folder, on the CPU.

    Raises:
        UsageError: nothing to load there, or it is damaged.
    """
    folder = resolve_model_folder(path)
    if not (folder / SHARDS).is_dir():
        return GSAForCausalLM.from_pretrained(folder, local_files_only=True)
    checkpoint = open_checkpoint(folder)
    model = GSAForCausalLM(GSAConfig.from_pretrained(folder, local_files_only=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(checkpoint.read(f"model/{name}"))
    return model.eval()


def export(path: str | Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model and its tokenizer into `target`, a folder that `from_pretrained` of transformers reads.

    Args:
        path: as for `load_model`.
        target: a folder that is made, is empty, or holds an earlier export, whose files are replaced.
        dtype: of the weights; None: as they were trained.

    Raises:
        UsageError: as `load_model`; `target` is a file, holds something else, or cannot be written.
    """
    from flash_gsa.data import load_tokenizer

    folder = resolve_model_folder(path)
    _check_target(target, folder)
    model = load_model(folder)
    if dtype is not None:
        model = model.to(dtype)  # type: ignore[arg-type]
    try:
        model.save_pretrained(target)
        for path in target.glob("*.safetensors"):  # see `save_tensors`
            path.chmod((target / "config.json").stat().st_mode)
        if (folder / "tokenizer.json").is_file():
            load_tokenizer(str(folder)).save_pretrained(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}. Name another folder, or free some space") from error


def _check_target(target: Path, model: Path) -> None:
    """Raises UsageError if an export of the folder `model` into `target` would do nothing, or harm what lies there."""
    try:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is a file. Expected a folder for the model: give the name of another one")
        if target.is_dir() and target.samefile(model):
            raise UsageError(f"{target} is the folder that the model is read from. Give another folder")
        if target.is_dir() and any(target.iterdir()) and not _is_export(target):
            raise UsageError(
                f"the folder {target} holds other things than an earlier export, so nothing is written into it. Give "
                "another folder: one that does not exist yet, or is empty"
            )
    except OSError as error:
        raise UsageError(f"{target} cannot be read: {error.strerror}. Name another folder") from error


def _is_export(folder: Path) -> bool:
    """Whether a model of ours lies there that is not part of a run: no checkpoint, no run's own folder."""
    if any((folder / name).exists() for name in (RECIPE_FILE, METRICS_FILE, MANIFEST)):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == GSAConfig.model_type
