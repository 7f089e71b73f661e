"""`flash-gsa eval`: how well a model predicts texts."""

import json
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from flash_gsa.cli.checkpoint import CheckpointArgument, DeviceOption, PrecisionOption, load_text_model, open_engine
from flash_gsa.errors import UsageError


def evaluate(
    checkpoint: CheckpointArgument,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Files, folders or patterns (.txt, .jsonl, .parquet, …; plain, .gz, .xz or .zst), or stdlib.",
            show_default=False,
        ),
    ],
    text_field: Annotated[
        str, typer.Option(help="Field of .jsonl and .parquet records that holds the text.", metavar="NAME")
    ] = "text",
    source_field: Annotated[
        str | None,
        typer.Option(
            help="Field that holds the label to report by.", metavar="NAME", show_default="source, or the file's name"
        ),
    ] = None,
    tokens_per_pass: Annotated[
        int, typer.Option(help="Tokens run at once: decides memory, not the result.", metavar="N")
    ] = 16_384,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure how well a model predicts texts: perplexity per token and bits per byte, by source.

    Each document is scored whole, however long, including the token that ends it. Bits per byte can be
    compared between models with different tokenizers, and with compressors; perplexity per token cannot.

    Examples:

    [bold]flash-gsa eval runs/demo notes.txt[/bold]

    [bold]flash-gsa eval runs/prose_15m valid.jsonl.zst --json[/bold]
    """
    import numpy as np

    from flash_gsa.data import iter_whole_documents, prepare_tokens
    from flash_gsa.data.sources import open_sources
    from flash_gsa.evaluation import evaluate_documents

    if tokens_per_pass < 1:
        raise UsageError(f"--tokens-per-pass is {tokens_per_pass}; expected 1 or more")
    # Names that are wrong are told at once, before a large model is loaded.
    open_sources(files, text_field=text_field, source_field=source_field)
    engine = open_engine(device, precision)
    model, tokenizer = load_text_model(checkpoint, engine)
    with TemporaryDirectory() as folder:
        store = prepare_tokens(files, tokenizer, cache_dir=folder, text_field=text_field, source_field=source_field)
        batches = iter_whole_documents(store, np.arange(store.num_documents), tokens_per_pass)
        result = evaluate_documents(model, batches, autocast=engine.autocast)
    if as_json:
        by_source = {name: score.as_dict() for name, score in result.by_source.items()}
        print(json.dumps({"total": result.total.as_dict(), "by_source": by_source}, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"{checkpoint} on {engine.describe()}", caption_justify="left")
    table.add_column("source", overflow="fold")  # cut short, two could look alike
    for column in ("documents", "bytes", "tokens", "perplexity per token", "bits per byte"):
        table.add_column(column, justify="right")
    rows = list(result.by_source.items())
    for name, score in [*rows, ("all", result.total)] if len(rows) > 1 else rows:
        counts = (f"{n:,}" for n in (score.documents, score.bytes, score.tokens))
        table.add_row(name, *counts, f"{score.perplexity:.2f}", f"{score.bits_per_byte:.4f}")
    Console().print(table)
