"""`flash-gsa recipes`: the training runs that come with flash-gsa."""

from typing import Annotated

import typer

from flash_gsa.cli.completion import recipe_names, shipped_recipes
from flash_gsa.errors import UsageError, did_you_mean


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Print this recipe's YAML instead.", autocompletion=recipe_names, show_default=False
        ),
    ] = None,
) -> None:
    """List the training recipes that come with flash-gsa, or print one.

    Example: [bold]flash-gsa recipes demo > mine.yaml[/bold], change it, then
    [bold]flash-gsa train ./mine.yaml[/bold]
    """
    from flash_gsa._resources import shipped

    known = shipped_recipes()
    if name is None:
        _print_table(known)
    elif name in known:
        print((shipped("recipes") / f"{name}.yaml").read_text("utf-8"), end="")
    else:
        raise UsageError(f"there is no recipe {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}")


def _print_table(known: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it trains", box=None, pad_edge=False)
    for recipe, description in known.items():
        table.add_row(recipe, description)
    Console().print(table)
