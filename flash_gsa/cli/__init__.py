"""The command `flash-gsa`: one file a command, each a thin shell over the library.

Commands import what they need when they run, so that `--help` and completion answer at once.
"""

import os
import sys

import typer

from flash_gsa.cli import bench, demo, doctor, evaluate, export, generate, inspect, recipes, report, train
from flash_gsa.errors import UsageError

app = typer.Typer(
    name="flash-gsa",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Gated Slot Attention language models: train, measure, write with and look into them.\n\n"
    "Start with [bold]flash-gsa demo[/bold]; [bold]flash-gsa COMMAND --help[/bold] explains a command.",
)

app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("recipes")(recipes.recipes)
app.command("report")(report.report)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.bench, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.

    Args:
        arguments: what follows `flash-gsa`; by default, what the process was started with.
    """
    try:
        app(arguments, prog_name="flash-gsa")
    except UsageError as mistake:
        if not mistake.everywhere or int(os.environ.get("RANK", 0)) == 0:
            print(f"flash-gsa: {mistake}", file=sys.stderr)
        sys.exit(mistake.status)
