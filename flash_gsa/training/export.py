"""A checkpoint as a model: loaded, or written as a Hugging Face folder. Needs no GPU and no other process."""

from pathlib import Path

import torch

from flash_gsa.errors import UsageError
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.training.checkpoint import SHARDS, open_checkpoint, resolve_model_folder


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
        target: made if it is not there; files of the same names are replaced.
        dtype: of the weights; None: as they were trained.

    Raises:
        UsageError: as `load_model`; `target` cannot be written.
    """
    from flash_gsa.data import load_tokenizer

    folder = resolve_model_folder(path)
    model = load_model(folder)
    if dtype is not None:
        model = model.to(dtype)  # type: ignore[arg-type]
    try:
        model.save_pretrained(target)
        if (folder / "tokenizer.json").is_file():
            load_tokenizer(str(folder)).save_pretrained(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}. Name another folder, or free some space") from error
