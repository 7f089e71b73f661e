"""`flash-gsa bench tune`: the fastest tiles of the Triton kernels on this GPU."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

CommitOption = Annotated[
    str | None,
    typer.Option("--commit", help="The commit of the code, where it lies outside a git checkout.", metavar="HASH"),
]


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A shape to tune for, e.g. 1.3B, 7B, GLA-1.3B; may be given several times.",
            metavar="NAME",
            show_default="all",
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="A kernel to tune: states, outputs, values_backward, states_backward, inputs_backward; may be "
            "given several times. Then C and BT stay as they are.",
            metavar="NAME",
            show_default="all, C and BT",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds for everything, shared among the rows.", metavar="SECONDS", show_default="no end"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Processes that compile at once.", metavar="N", show_default="one a processor core"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for all candidates, written anew after each row.", metavar="FILE")
    ] = None,
    commit: CommitOption = None,
) -> None:
    """Measure rows for the table of tiles of the Triton kernels anew, on the GPU of this machine.

    For each row, tiles near those there are now are compiled in parallel, their results compared with those
    of the others, and timed twice by turns; then the fastest of each kernel together, beside the row there is, which
    stays unless they are faster by more than the spread. What is to be pasted into the table is printed at the
    end. Tiles that fail, for instance for want of shared memory, are listed with the reason.

    Examples:

    [bold]flash-gsa bench tune --output tiles.json[/bold]

    [bold]flash-gsa bench tune --shape 1.3B --shape 7B --budget 100[/bold]

    [bold]flash-gsa bench tune --shape 1.3B --kernel inputs_backward[/bold]
    """
    from flash_gsa.benchmarking.tune import Options, tune

    given = [("--shape", name) for name in shape or ()] + [("--kernel", name) for name in kernel or ()]
    given += [(name, f"{value:g}") for name, value in (("--budget", budget), ("--jobs", jobs)) if value is not None]
    given += [("--commit", commit)] if commit else []
    command = shlex.join(["flash-gsa", "bench", "tune", *(word for pair in given for word in pair)])
    options = Options(tuple(shape or ()), tuple(kernel or ()), budget, jobs, command, commit)
    tune(options, output, say=lambda line: print(line, flush=True))
    if output is not None:
        print(f"written: {output}")
