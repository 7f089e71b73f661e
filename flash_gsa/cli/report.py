"""`flash-gsa report`: a page with the figures, pictures and events of a run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
) -> None:
    """Write the report of a run, finished or not: report.html in its folder, one page without outside parts.

    A run writes it at its end by itself.

    Example: [bold]flash-gsa report runs/demo[/bold]
    """
    from flash_gsa.training.report import write_report

    typer.echo(write_report(run))
