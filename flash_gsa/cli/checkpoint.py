"""Loading what a command was told to use: a model with its tokenizer, a device, a text."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from flash_gsa.training.engine import Engine

CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run (runs/demo: its newest checkpoint), one checkpoint of it, or a saved model's folder.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.", metavar="NAME")
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="auto (bf16 on a GPU that has it), bf16 or fp32.", metavar="NAME")
]


def open_engine(device: str, precision: str = "auto") -> "Engine":
    """The device and precision that were asked for. Raises UsageError if they are not to be had."""
    from flash_gsa.training.engine import Engine

    if precision not in (known := ("auto", "bf16", "fp32")):
        raise UsageError(f"--precision {precision!r} is not known; choose one of {', '.join(known)}")
    return Engine(device, precision)


def load_checkpoint(path: Path, engine: "Engine") -> tuple[Any, Any]:
    """(model in evaluation mode on the engine's device, tokenizer or None if the model was made without one).

    Raises:
        UsageError: nothing to load there, a damaged checkpoint, or a tokenizer with more tokens than the model.
    """
    from flash_gsa.data import load_tokenizer
    from flash_gsa.training.checkpoint import resolve_model_folder
    from flash_gsa.training.export import load_model

    quiet_transformers()
    folder = resolve_model_folder(path)
    model: Any = load_model(folder)
    model = model.to(engine.device).eval()
    tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model only {model.config.vocab_size}; "
            "these two do not belong together. Put back the tokenizer that the model was trained with"
        )
    return model, tokenizer


def quiet_transformers() -> None:
    """Keep the bars and notices of transformers out of what our commands print."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_text_model(path: Path, engine: "Engine") -> tuple[Any, Any]:
    """`load_checkpoint`, refusing a model without a tokenizer."""
    model, tokenizer = load_checkpoint(path, engine)
    if tokenizer is None:
        raise UsageError(
            f"{path} holds no tokenizer.json, so its model cannot read text. Models of made-up tasks (mqar) have "
            "none; for a model of text, save its tokenizer beside it"
        )
    return model, tokenizer


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """`[bos] tokens` of a text that goes on, so without the end token."""
    from flash_gsa.data.encoding import encode_documents

    ids = [int(i) for i in encode_documents(tokenizer, [text])[0]]
    return ids[:-1] if tokenizer.eos_token_id is not None else ids


def read_text(argument: str) -> str:
    """The text in the file of that name; "-": what comes in on stdin; else the argument itself.

    Raises:
        UsageError: the file is empty, or it or the input is not UTF-8 text.
    """
    from flash_gsa.data.documents import Fields
    from flash_gsa.data.readers import read_text as documents_of

    if argument == "-":
        return read_stdin()
    try:
        is_file = Path(argument).is_file()
    except (OSError, ValueError):
        # Longer than a file's name can be, or with a null byte: not a file.
        is_file = False
    return next(documents_of(Path(argument), "", Fields())).text if is_file else argument


def read_stdin() -> str:
    """All of stdin as text. Raises UsageError if it is not UTF-8."""
    from flash_gsa.data.readers import decode_utf8

    return decode_utf8(sys.stdin.buffer.read(), Path("standard input"))
