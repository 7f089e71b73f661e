"""`flash-gsa doctor`: what this machine can run, and what would stop it."""

import json
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine can run: versions, devices, operator backends.

    Compares the installed packages with what flash-gsa needs and what it was tested with, lists the
    devices with their memory (GiB), says which operator backend would be chosen on each and why not the
    others, and runs the operator on each device against the reference in 64-bit numbers.

    Exit status: 0 if flash-gsa is usable here, 1 if not.

    Example: [bold]flash-gsa doctor --json > machine.json[/bold]
    """
    from flash_gsa.cli.machine import diagnose

    report = diagnose()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report["usable"] else 1)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from flash_gsa.cli.machine import TYPICAL

    console = Console(highlight=False)
    console.print(
        f"flash-gsa {report['flash_gsa']}, Python {report['python']}, {report['system']}, "
        f"{report['disk_free_gib']} GiB of disk free here"
    )
    table = Table("package", "needed", "tested", "installed", "")
    for p in report["packages"]:
        style = "red" if p["problem"] else None
        cells = (p["name"], p["needed"], p["tested"] or "", p["installed"] or "", p["verdict"])
        table.add_row(*cells, style=style)
    console.print(table)
    cuda = f"made for CUDA {report['cuda']}" if report["cuda"] else "made without CUDA"
    console.print(f"torch is {cuda}; triton {report['triton'] or 'is not installed'}\n")

    for device in report["devices"]:
        memory = "" if device["memory_gib"] is None else f", {device['memory_gib']} GiB"
        console.print(f"[bold]{device['device']}[/bold]: {device['name']}, {device['about']}{memory}")
    if len(report["devices"]) == 1:
        console.print("no GPU that torch can use: training and generation run on the CPU")
    sizes = ", ".join(f"{name} {size}" for name, size in TYPICAL.items())
    table = Table("device", "operator backend", "", "self-test", caption=f"for {sizes}", caption_justify="left")
    for device in report["devices"]:
        for i, backend in enumerate(device["backends"]):
            first = (device["device"], device["self_test"]) if i == 0 else ("", "")
            table.add_row(first[0], backend["name"], backend["verdict"], first[1])
        table.add_section()
    console.print(table)

    if report["usable"]:
        console.print("This machine can run flash-gsa.", style="green")
    for problem in report["problems"]:
        console.print(f"Problem: {problem}", style="red", markup=False)
