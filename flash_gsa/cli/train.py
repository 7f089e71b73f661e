"""`flash-gsa train`: a recipe, with overrides, becomes a run."""

import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from flash_gsa.cli.checkpoint import quiet_transformers
from flash_gsa.cli.completion import recipe_keys, recipe_names
from flash_gsa.errors import UsageError

if TYPE_CHECKING:
    from flash_gsa.training.trainer import TrainResult

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe (flash-gsa recipes lists them) or path of a YAML file.",
        autocompletion=recipe_names,
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that replace the recipe's, e.g. schedule.minutes=2 optimizer.lr=1e-3 model.num_slots=32",
        autocompletion=recipe_keys,
        show_default=False,
    ),
]


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete a run that is in the folder and start anew.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Train nothing: print sizes, work, time and memory, and refuse what cannot fit."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(help="With --dry-run: how many processes.", show_default="as started, else 1"),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="With --dry-run: memory of a device, e.g. 80GiB.", show_default="of the GPU here"),
    ] = None,
) -> None:
    """Train a model by a recipe.

    Everything goes to one folder, runs/NAME unless output_dir says otherwise: checkpoints, metrics.jsonl,
    TensorBoard files, loss.png and report.html. A run that was interrupted (Ctrl-C, SIGTERM, a crash) goes on from its
    newest checkpoint when the same command is given again, with the losses it would have had anyway.

    Examples:

    [bold]flash-gsa train demo[/bold]

    [bold]flash-gsa train demo schedule.minutes=1 output_dir=runs/short[/bold]

    [bold]flash-gsa train ./mine.yaml device=cpu[/bold]

    [bold]flash-gsa train gsa_1.3b --dry-run --processes 8 --device-memory 80GiB[/bold]
    """
    if dry_run:
        from flash_gsa.cli.dry_run import show_dry_run

        return show_dry_run(recipe, overrides or [], processes, device_memory)
    if processes is not None or device_memory is not None:
        raise UsageError("--processes and --device-memory go with --dry-run; a run takes what its launcher started")
    from flash_gsa.training.progress import ProgressDisplay
    from flash_gsa.training.recipe_file import load_recipe
    from flash_gsa.training.trainer import train as run

    quiet_transformers()
    with ProgressDisplay() as display:
        result = run(
            load_recipe(recipe, overrides or []), existing="overwrite" if fresh else "resume", on_event=display
        )
    exit_if_stopped(result)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(f"checkpoint  {result.checkpoint}")
        typer.echo(f"metrics     {result.run_dir / 'metrics.jsonl'}")
        typer.echo(f"loss curve  {result.picture}")
        typer.echo(f"report      {result.report}")


def exit_if_stopped(result: "TrainResult") -> None:
    """Leave with the status that shells expect of a process that a signal ended: 128 + its number."""
    if result.signal is not None:
        raise typer.Exit(128 + signal.Signals[result.signal])
