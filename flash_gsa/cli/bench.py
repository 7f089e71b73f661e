"""`flash-gsa bench`: what the operator and training cost on this machine."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from flash_gsa.cli.bench_tune import CommitOption, tune
from flash_gsa.cli.checkpoint import DeviceOption
from flash_gsa.errors import UsageError

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure what the operator and training cost on this machine, beside other implementations.",
)
PlotsOption = Annotated[
    Path | None, typer.Option("--plots", help="Folder for pictures of the result (PNG).", metavar="FOLDER")
]
UNRECORDED = ("output", "plots", "profile")
"""Options that decide where things go, not what is measured."""
OF_OPERATOR, OF_TRAINING = {"about", "shapes", "lengths"}, {"about", "steps", "size"}
"""What their result files have."""


@bench.command("op")
def op(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything measured, written anew as it grows.", metavar="FILE")
    ] = None,
    plots: PlotsOption = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Shapes or families of them, e.g. 1.3B,7B-4x4096.",
            metavar="NAME,…",
            show_default="all for the device",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="What to measure: auto, recompute, a backend's name, sdpa-cudnn, sdpa-flash, fla.",
            metavar="NAME,…",
            show_default="all that run here",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts of the benchmark: ceilings, shapes, layer, decoding, lengths, cold_start.",
            metavar="PART,…",
            show_default="all",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds of timed calls in one measurement.", metavar="SECONDS", show_default="0.5; on a CPU 1"
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Repeats within the budget, to show the spread.", metavar="N", show_default="3"),
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds after which one measurement is given up.", metavar="SECONDS")
    ] = 600.0,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Give up what is not measured after so many minutes; peers that tune themselves come last.",
            metavar="N",
            show_default="no end",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="All of it at tiny sizes, to see that it works; the figures mean nothing.")
    ] = False,
    cold_fla: Annotated[
        bool, typer.Option("--cold-fla", help="Time FLA's start with empty caches too: about 8 minutes.")
    ] = False,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
) -> None:
    """Measure time and memory of the operator, beside FLA and softmax attention where they are to be had.

    Values come before speed: what differs from its definition in 64-bit numbers is reported as wrong and
    not timed. Then: forward, and forward and backward, at the shapes of models; the layer around it, and what
    surrounds it there, fused and separate; one decoding step; time and memory against the length; the start
    of a new process with empty caches; and what the device can do at best. A measurement that fails or takes
    too long is recorded as such, and the next begins.

    Examples:

    [bold]flash-gsa bench op --quick[/bold]

    [bold]flash-gsa bench op --output op.json --plots pictures[/bold]

    [bold]flash-gsa bench op --shapes 1.3B --peers auto,fla --only ceilings,shapes --output op.json[/bold]
    """
    from rich.console import Console

    from flash_gsa.benchmarking.op import Options, benchmark
    from flash_gsa.benchmarking.report import LEGEND, tables

    options = Options(
        device=device,
        quick=quick,
        shapes=_names(shapes),
        peers=_names(peers),
        only=_names(only),
        budget=budget,
        repeats=repeats,
        limit=limit,
        minutes=minutes,
        cold_fla=cold_fla,
        command=_command(context),
        commit=commit,
    )
    result = benchmark(options, output, say=lambda line: print(line, flush=True))
    console = Console()
    for table in tables(result):
        console.print(table)
        console.print()
    console.print(LEGEND, style="dim")
    if output is not None:
        print(f"written: {output}")
    if plots is not None:
        _draw(result, plots)


@bench.command("train")
def train(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything measured, written anew as it grows.", metavar="FILE")
    ] = None,
    plots: PlotsOption = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="JSON file for the kernels of our steps by time and by category.", metavar="FILE"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the models: 130M, 340M, 1.3B, 2.7B, tiny.", metavar="NAME", show_default="1.3B; on a CPU tiny"
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step.", metavar="N", show_default="16384; on a CPU 64")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Lengths of sequences that these are cut into.",
            metavar="N,…",
            show_default="2048,4096,8192,16384; on a CPU 32,64",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Whom to measure: ours, llama, fla.", metavar="NAME,…", show_default="all that run here"),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            help="Ways to run them: plain, compiled (ours, llama), graph (ours), linear-loss (fla).", metavar="NAME,…"
        ),
    ] = "plain,compiled",
    precision: Annotated[
        str | None,
        typer.Option(
            help="pure_bf16 (weights and moments too), bf16 (only products) or fp32.",
            metavar="NAME",
            show_default="pure_bf16; on a CPU fp32",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps that are timed.", metavar="N", show_default="10; on a CPU 3")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts of the benchmark: ceilings, steps, profile, cold_start.",
            metavar="PART,…",
            show_default="all, profile with --profile",
        ),
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds after which one measurement is given up.", metavar="SECONDS")
    ] = 900.0,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Give up what is not measured after so many minutes; FLA, which tunes itself, comes last.",
            metavar="N",
            show_default="no end",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model, to see that it works; the figures mean nothing.")
    ] = False,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
) -> None:
    """Measure training steps of our model beside FLA's and a Llama of the same size, at the same tokens a step.

    Values come before speed: what differs from 64-bit numbers at a small size is reported as wrong and not timed.
    Then, against the length of sequences: seconds a step by parts, tokens a second, FLOP/s, peak memory and the time
    of the first step; ours also in a new process with empty caches.

    Examples:

    [bold]flash-gsa bench train --quick[/bold]

    [bold]flash-gsa bench train --output train.json --plots pictures[/bold]

    [bold]flash-gsa bench train --peers ours --lengths 2048 --only profile --profile kernels.json[/bold]
    """
    from rich.console import Console

    from flash_gsa.benchmarking.about import write
    from flash_gsa.benchmarking.train import Options, benchmark
    from flash_gsa.benchmarking.train_report import LEGEND, tables

    options = Options(
        device=device,
        quick=quick,
        size=size,
        tokens=tokens,
        lengths=_whole_numbers("lengths", lengths),
        peers=_names(peers),
        variants=_names(variants),
        precision=precision,
        steps=steps,
        only=_names(only),
        profile=profile is not None,
        limit=limit,
        minutes=minutes,
        command=_command(context),
        commit=commit,
    )
    result = benchmark(options, output, say=lambda line: print(line, flush=True))
    console = Console()
    for table in tables(result):
        console.print(table)
        console.print()
    console.print(LEGEND, style="dim")
    if output is not None:
        print(f"written: {output}")
    if profile is not None:
        write({key: result[key] for key in ("about", "size", "precision", "profile")}, profile)
        print(f"written: {profile}")
    if plots is not None:
        _draw(result, plots)


@bench.command("plots")
def plots(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="What `bench op` or `bench train` wrote. Of several of `bench op`, what a later one has holds.",
            show_default=False,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the pictures go (PNG).", show_default=False)],
) -> None:
    """Draw the pictures of a result file again, or of several as one.

    Example: [bold]flash-gsa bench plots op.json pictures[/bold]
    """
    found = [_result(file) for file in results]
    if len(found) > 1:
        from flash_gsa.benchmarking.report import combined

        for file, result in zip(results, found, strict=True):
            if not result.keys() >= OF_OPERATOR:
                raise UsageError(f"{file} is no result of `flash-gsa bench op`; only those are drawn as one")
        found = [combined(*found)]
    _draw(found[0], folder)


def _result(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read: {error.strerror}; expected what `bench op --output` or `bench train` wrote"
        ) from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not any(found.keys() >= keys for keys in (OF_OPERATOR, OF_TRAINING)):
        raise UsageError(f"{file} is no result of `flash-gsa bench op` or `bench train` with --output FILE")
    return found


bench.command("tune")(tune)


@bench.command("drift")
def drift(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Tokens to decode.", metavar="N")] = 100_000,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything measured, written anew as it grows.", metavar="FILE")
    ] = None,
    device: DeviceOption = "auto",
    commit: CommitOption = None,
) -> None:
    """Measure how far decoding drifts from the exact recurrence, with states in float32 and in bfloat16.

    By how long slots remember, from 10 to 100,000 tokens, after 1, 10, 100, … tokens.

    Example: [bold]flash-gsa bench drift --steps 100000 --output drift.json[/bold]
    """
    from flash_gsa.benchmarking.drift import measure_drift

    measure_drift(steps, output, device, _command(context), commit, say=lambda line: print(line, flush=True))
    if output is not None:
        print(f"written: {output}")


def _draw(result: dict[str, Any], folder: Path) -> None:
    from flash_gsa.benchmarking import plots, train_plots

    drawn = (train_plots if result.keys() >= OF_TRAINING else plots).draw(result, folder)
    print(f"drawn: {', '.join(str(path) for path in drawn)}" if drawn else "nothing to draw: no part of it ran")


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip()) if given else ()


def _whole_numbers(name: str, given: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in _names(given))
    except ValueError:
        raise UsageError(
            f"--{name} is {given!r}; expected whole numbers with commas between them, as 2048,4096"
        ) from None


def _command(context: typer.Context) -> str:
    """The command as typed, without where things go."""
    words = ["flash-gsa", "bench", context.command.name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in UNRECORDED or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join(words)
