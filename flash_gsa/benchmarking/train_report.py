"""A result of the training benchmark in words: one line a measurement while it runs, tables at the end."""

from typing import TYPE_CHECKING, Any

from .report import told as told_of_operator
from .report import verdict

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

NAMES = {"ours": "flash-gsa", "fla": "FLA", "llama": "Llama"}
LEGEND = (
    "× FLA: tokens a second, as many times those of FLA as it comes. MFU: FLOPs of the model's definition, as a share "
    "of what the device's data sheet promises. GiB: most that was allocated during steps, weights and moments included."
)


def named(record: Record) -> str:
    """Who, for people: "flash-gsa, compiled"."""
    name, variant = NAMES[record["implementation"]], record["variant"]
    return name if variant == "plain" else f"{name}, {variant}"


def told(part: str, record: Record) -> str:
    """A record in one line."""
    if record.get("problem"):
        return record["problem"]
    if part == "ceilings":
        return told_of_operator(part, record)
    if part == "gates":
        name, (distance, limit) = max(record["errors"].items(), key=lambda item: item[1][0] / item[1][1])
        return f"values agree with float64; the worst, {name}, is off by {distance:.1e} (allowed: {limit:.1e})"
    if part == "cold_start":
        first, second = (record[key]["first_step_seconds"] for key in ("first", "second"))
        return f"first step after {first:.1f} s with empty caches, {second:.1f} s with filled ones"
    if part == "profile":
        top = ", ".join(f"{row['category']} {row['milliseconds']:.1f}" for row in record["categories"][:4])
        return f"{record['milliseconds']:.1f} ms a step, {record['kernel_milliseconds']:.1f} in kernels: {top}"
    said = f"{record['tokens_per_second']:,.0f} tokens/s, {1e3 * record['seconds']:,.1f} ms a step"
    if "parts" in record:
        said += " (" + " + ".join(f"{1e3 * seconds:,.1f}" for seconds in record["parts"].values()) + ")"
    if "mfu" in record:
        said += f", MFU {record['mfu']:.1%}"
    if "peak_bytes" in record:
        said += f", {gibibytes(record['peak_bytes'])} GiB"
    if power := record.get("power"):
        said += f", {power['watts']:.0f} of {power['limit_watts']:.0f} W at {power['sm_mhz']:,.0f} MHz"
    return f"{said}, first step {record['first_step_seconds']:.1f} s"


def gibibytes(count: int) -> str:
    """GiB with one decimal."""
    return f"{count / 2**30:,.1f}"


def times_fla(record: Record, steps: list[Record]) -> float | None:
    """How many times FLA's tokens a second at the same length; None for FLA itself and without it."""
    if record["implementation"] == "fla" or record["problem"]:
        return None
    for other in steps:
        same = (other["implementation"], other["variant"], other["length"]) == ("fla", "plain", record["length"])
        if same and not other["problem"]:
            return record["tokens_per_second"] / other["tokens_per_second"]
    return None


def tables(result: Record) -> list["Table"]:
    """What ran; made for a terminal of 80 columns."""
    from rich.table import Table

    title = f"Training steps: {result['size']['name']}, {result['tokens']:,} tokens a step, {result['precision']}"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in ("", "rows × length", "ms", "tokens/s", "× FLA", "MFU", "GiB", "first step, s"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for r in result["steps"]:
        if (r["problem"] or "").startswith("not run"):
            continue
        ratio = times_fla(r, result["steps"])
        cells = [verdict(r)] if r["problem"] else [
            f"{1e3 * r['seconds']:,.1f}",
            f"{r['tokens_per_second']:,.0f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{r['mfu']:.1%}" if "mfu" in r else "",
            gibibytes(r["peak_bytes"]) if "peak_bytes" in r else "",
            f"{r['first_step_seconds']:.1f}",
        ]  # fmt: skip
        table.add_row(named(r), f"{r['rows']}×{r['length']}", *cells)
    shown = [table, *(_profile_table(record) for record in result["profile"] if not record["problem"])]
    return [table for table in shown if table.row_count]


def _profile_table(record: Record) -> "Table":
    from rich.table import Table

    title = f"Where {record['milliseconds']:.1f} ms of {named(record)} go, {record['rows']}×{record['length']}"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in ("", "calls", "ms", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for row in record["categories"]:
        table.add_row(row["category"], f"{row['calls']:.0f}", f"{row['milliseconds']:.2f}", f"{row['share']:.1%}")
    table.add_row("(no kernel running)", "", f"{record['milliseconds'] - record['kernel_milliseconds']:.2f}", "")
    return table
