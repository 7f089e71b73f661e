"""`flash-gsa demo`: train a small language model, measure it, let it write, look into it."""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_gsa.cli.checkpoint import quiet_transformers
from flash_gsa.cli.completion import recipe_keys
from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from flash_gsa.training.recipe import Recipe
    from flash_gsa.training.trainer import TrainResult

ORDERS = 5
"""The n-gram models beside the language model see up to so many bytes of context."""

PASSAGE_CHARACTERS = 300
SAMPLE_TOKENS = 120
SLOT_TOKENS = 96


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values that replace those of the recipe demo, e.g. schedule.minutes=1 model.num_slots=64",
            autocompletion=recipe_keys,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for everything that is written.", metavar="FOLDER", show_default="runs/demo"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew instead of showing a finished demo.")] = False,
) -> None:
    """Train a small GSA language model on Python's standard library, then show what it has learned.

    Needs nothing but this computer: at most 6 minutes on 2 CPU cores, below 4 GiB of memory. Prints bits per
    byte of held-out text beside byte n-gram models (fitted on the same bytes) and xz, a sample, and where the
    checkpoint, the loss curve and the pictures of the slots are.

    Examples:

    [bold]flash-gsa demo[/bold]

    [bold]flash-gsa demo schedule.minutes=1 --out runs/quick[/bold]
    """
    from rich.console import Console

    from flash_gsa.training.recipe_file import load_recipe

    console = Console()
    recipe = load_recipe("demo", [*(overrides or []), *([f"output_dir={json.dumps(str(out))}"] if out else [])])
    if recipe.data.kind != "text":
        raise UsageError("the demo is about text; train other data with: flash-gsa train RECIPE")
    result = _train(recipe, fresh, console)
    started = time.monotonic()
    with console.status("measuring, writing, drawing …"):
        report = _examine(recipe, result)
    report["seconds_after_training"] = round(time.monotonic() - started, 1)
    path = result.run_dir / "result.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(report, path, console)


def _train(recipe: "Recipe", fresh: bool, console: Any) -> "TrainResult":
    from flash_gsa.cli.train import exit_if_stopped
    from flash_gsa.training.events import Event, Stepped
    from flash_gsa.training.progress import ProgressDisplay
    from flash_gsa.training.trainer import train

    quiet_transformers()
    trained = False
    with ProgressDisplay(console) as display:

        def listen(event: Event) -> None:
            nonlocal trained
            trained = trained or isinstance(event, Stepped)
            display(event)

        result = train(recipe, existing="overwrite" if fresh else "resume", on_event=listen)
    exit_if_stopped(result)
    if not trained:
        message = f"{result.run_dir} holds a finished demo: showing it again. --fresh trains anew."
        console.print(message, highlight=False, soft_wrap=True)
    return result


def _examine(recipe: "Recipe", result: "TrainResult") -> dict[str, Any]:
    """Everything the demo shows, ready for JSON."""
    import torch

    from flash_gsa import __version__
    from flash_gsa.cli.checkpoint import load_text_model, open_engine, prompt_ids
    from flash_gsa.cli.generate import sampling, write
    from flash_gsa.cli.inspect import draw_slots
    from flash_gsa.data import PackedBatches, iter_whole_documents
    from flash_gsa.evaluation import ByteNGrams, evaluate_documents, xz_bits_per_byte
    from flash_gsa.training.inputs import part_documents, text_parts

    engine = open_engine(recipe.device, recipe.precision)
    model, tokenizer = load_text_model(result.checkpoint, engine)
    parts = text_parts(recipe, tokenizer)
    batch = recipe.batch
    stream = PackedBatches(parts.train, length=batch.length, rows=batch.rows, seed=recipe.seed)
    seen = list(_texts_seen(stream, result.step, tokenizer))
    held_out = list(part_documents(recipe, parts, "held_out"))
    held_out_bytes = [document.text.encode() for document in held_out]

    batches = iter_whole_documents(parts.held_out_store, parts.held_out, batch.tokens)
    scores = evaluate_documents(model, batches, autocast=engine.autocast)
    ngrams = ByteNGrams(seen, ORDERS).bits_per_byte(held_out_bytes)

    passage = _passage([document.text for document in held_out])
    pieces: list[str] = []
    with engine.autocast():
        settings = sampling(SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=0)
        write(model, tokenizer, prompt_ids(tokenizer, passage), settings, on_text=pieces.append)
    shown = prompt_ids(tokenizer, passage)[:SLOT_TOKENS]
    picture, page = draw_slots(model, tokenizer, shown, result.run_dir, title=str(result.run_dir))
    return {
        "flash_gsa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": engine.describe(),
        "steps": result.step,
        "tokens": result.metrics["tokens"],
        "training_seconds": result.metrics["seconds"],
        "training_bytes": sum(map(len, seen)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_bytes": scores.total.bytes,
        "held_out_documents": scores.total.documents,
        "bits_per_byte": {
            "model": scores.total.bits_per_byte,
            "by_source": {name: score.bits_per_byte for name, score in scores.by_source.items()},
            **{f"order_{order}": bits for order, bits in enumerate(ngrams)},
            "xz": xz_bits_per_byte(held_out_bytes),
        },
        "sample": {"passage": passage, "continuation": "".join(pieces)},
        "paths": {
            "checkpoint": str(result.checkpoint),
            "metrics": str(result.run_dir / "metrics.jsonl"),
            "loss curve": str(result.picture),
            "slots": str(picture),
            "slots to explore": str(page),
        },
    }


def _texts_seen(stream: Any, batches: int, tokenizer: Any) -> Iterator[bytes]:
    """The texts in the first `batches` of a `PackedBatches`, up to one epoch: a second brings no new bytes.

    Rows come in a drawn order, so pieces of documents are put one after the other, and a text ends where a document
    does: an n-gram model then meets no end of a document that is none.
    """
    left = stream.epoch_tokens
    text = b""
    for i in range(batches):
        batch = stream.batch(i)
        for ids in batch.input_ids[0].tensor_split(batch.cu_seqlens[1:-1].long()):
            if left <= 0:
                break
            left -= len(ids)
            # A row may begin or end within a character; what is left of it is none.
            text += tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip("\ufffd").encode()
            if ids[-1] == tokenizer.eos_token_id:
                yield text
                text = b""
    if text:
        yield text


def _passage(texts: list[str]) -> str:
    """The beginning of the first text that is long enough, cut at the end of a line where there is one."""
    text = next((t for t in texts if len(t) >= 2 * PASSAGE_CHARACTERS), max(texts, key=len))
    start, newline, _ = text[:PASSAGE_CHARACTERS].rpartition("\n")
    return start + newline or text[:PASSAGE_CHARACTERS]


def _print(report: dict[str, Any], path: Path, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    bits = report["bits_per_byte"]
    table = Table(
        title=f"Held-out text, {report['held_out_bytes']:,} bytes in {report['held_out_documents']} documents",
        title_justify="left",
        caption=f"All were fitted on the same {report['training_bytes']:,} bytes; xz reads the held-out text itself.",
        caption_justify="left",
    )
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    rows = [(f"byte n-grams, {k} byte{'s' * (k > 1)} of context", bits[f"order_{k}"]) for k in range(1, ORDERS + 1)]
    rows.append((f"this model, {report['parameters'] / 1e6:.2f} M parameters", bits["model"]))
    for name, value in sorted(rows, key=lambda row: -row[1]):
        table.add_row(name, f"{value:.3f}", style="bold" if name.startswith("this") else None)
    table.add_section()
    table.add_row("xz -9e", f"{bits['xz']:.3f}")
    console.print(table)

    sample = report["sample"]
    console.print("\nA held-out passage, and how the model goes on from it:", style="bold")
    console.print(Text(sample["passage"], style="dim", end=""), Text(sample["continuation"]), sep="")
    console.print()
    for name, place in {**report["paths"], "these figures": str(path)}.items():
        console.print(f"{name:<17} {place}", highlight=False, soft_wrap=True, markup=False)
    minutes, seconds = divmod(round(report["training_seconds"]), 60)
    console.print(
        f"\nTraining took {minutes} min {seconds:02d} s, the rest {report['seconds_after_training']:.0f} s. "
        f'Go on with: flash-gsa generate {path.parent} "import "',
        highlight=False,
        soft_wrap=True,
    )
