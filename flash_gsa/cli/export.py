"""`flash-gsa export`: a checkpoint becomes a Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer

from flash_gsa.cli.checkpoint import CheckpointArgument, quiet_transformers
from flash_gsa.errors import UsageError

_DTYPES = ("as-trained", "fp32", "bf16", "fp16")


def export(
    checkpoint: CheckpointArgument,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Where the model goes: new, empty, or an earlier export.", show_default=False
        ),
    ],
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of the weights: {', '.join(_DTYPES)}.")] = _DTYPES[0],
) -> None:
    """Write a checkpoint's model and tokenizer as a Hugging Face folder.

    From a checkpoint of any engine, also one whose weights lie in shards of many processes; needs no GPU.
    FOLDER is made. If it is there, it must be empty or hold an earlier export, which is replaced.

    Examples:

    [bold]flash-gsa export runs/gsa_1.3b my-model --dtype bf16[/bold]
    """
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; choose one of {', '.join(_DTYPES)}")
    import torch

    from flash_gsa.training.export import export as write

    quiet_transformers()
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    write(checkpoint, folder, known.get(dtype))
    typer.echo(f"model  {folder}")
