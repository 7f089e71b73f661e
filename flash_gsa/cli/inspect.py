"""`flash-gsa inspect`: pictures of what a model's slots do on a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flash_gsa.cli.checkpoint import (
    CheckpointArgument,
    DeviceOption,
    load_text_model,
    open_engine,
    prompt_ids,
    read_text,
)
from flash_gsa.errors import UsageError


def inspect(
    checkpoint: CheckpointArgument,
    text: Annotated[
        str,
        typer.Argument(
            help="A text, a file that holds one, or - for stdin.", metavar="TEXT_OR_FILE", show_default=False
        ),
    ],
    layer: Annotated[
        int | None, typer.Option(help="Only this layer, counted from 0.", metavar="N", show_default="all")
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Only this query head, counted from 0.", metavar="N", show_default="all")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Look at the first N tokens of the text.", metavar="N")] = 128,
    out: Annotated[Path, typer.Option(help="Folder for slots.png and slots.html.", metavar="FOLDER")] = Path("slots"),
    device: DeviceOption = "auto",
) -> None:
    """Look into a model: which slots each token is written to and read from, and what they forget.

    Writes slots.html, a page to explore by hovering over the text (all heads chosen), and slots.png, one head
    as a picture: of several, the one whose choice of slots depends most on the token.

    Examples:

    [bold]flash-gsa inspect runs/demo "def area(width, height): return width * height"[/bold]

    [bold]flash-gsa inspect runs/demo setup.py --layer 2 --head 0 --out look[/bold]
    """
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}; expected 1 or more")
    model, tokenizer = load_text_model(checkpoint, open_engine(device))
    ids = prompt_ids(tokenizer, read_text(text))
    if len(ids) > tokens:
        typer.echo(f"The text has {len(ids)} tokens; showing the first {tokens} (--tokens).", err=True)
    for path in draw_slots(model, tokenizer, ids[:tokens], out, title=str(checkpoint), layer=layer, head=head):
        typer.echo(path)


def draw_slots(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    folder: Path,
    *,
    title: str,
    layer: int | None = None,
    head: int | None = None,
) -> tuple[Path, Path]:
    """Write slots.png and slots.html for `ids` into `folder`; returns their paths."""
    from flash_gsa.inspection import save_page, save_picture, slot_activities, token_texts

    activities = slot_activities(
        model, ids, layers=None if layer is None else [layer], heads=None if head is None else [head]
    )
    texts = token_texts(tokenizer, ids)
    telling = max(activities, key=lambda a: a.selectivity)
    picture, page = folder / "slots.png", folder / "slots.html"
    save_page(activities, texts, page, title=f"Slots of {title}", first=telling)
    save_picture(telling, texts, picture, title=title)
    return picture, page
