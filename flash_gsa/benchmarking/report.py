"""A result in words: one line a measurement while it runs, tables at the end."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

NAMES = {
    "copy": "copy of the state",
    "auto": "flash-gsa",
    "fla": "FLA",
    "sdpa-cudnn": "softmax, cuDNN",
    "sdpa-flash": "softmax, flash",
    "reference": "the recurrence",
}
LEGEND = (
    "× least: with backward, how many times longer than a copy of the bytes that must be read and written. "
    "MiB: at the worst moment, above the inputs. error: largest distance of a result from 64-bit numbers."
)


def named(record: Record) -> str:
    """What was measured, for people: "flash-gsa (triton)", "FLA", …"""
    name = record["implementation"]
    if name == "auto" and record.get("backend"):
        return f"flash-gsa ({record['backend']})"
    return NAMES.get(name, f"flash-gsa: {name}")


def told(part: str, record: Record) -> str:
    """A record in one line."""
    if record.get("problem"):
        return record["problem"]
    if part == "ceilings":
        copied, product = record["copy"], record["product"]
        return f"{copied['bytes_per_second'] / 1e9:.3g} GB/s, {product['flops_per_second'] / 1e12:.3g} TFLOP/s"
    if part == "cold_start":
        first, second = record["first"], record["second"]
        return f"{first['seconds']:.1f} s to the first gradients, {second['seconds']:.1f} s with filled caches"
    if part == "decoding":
        return f"{1e6 * record['seconds']:,.1f} µs"
    memory = peak(record["forward_backward"])
    times = f"{milliseconds(record['forward'])} ms forward, {milliseconds(record['forward_backward'])} ms with backward"
    return times if memory is None else f"{times}, {memory:,.0f} MiB"


def milliseconds(cost: Record) -> str:
    """Three digits."""
    value = 1e3 * cost["seconds"]
    return f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def peak(cost: Record) -> float | None:
    """MiB above the inputs, or None where memory is not measured."""
    return None if cost["peak_bytes"] is None else cost["peak_bytes"] / 2**20


def largest_error(record: Record) -> float:
    """Distance from float64, the worst of all results at all sizes."""
    full = record.get("full_size_errors")
    pairs = [*record["errors"].values(), *(full.values() if isinstance(full, dict) else ())]
    return max(distance for distance, _ in pairs)


def verdict(record: Record) -> str:
    """ "wrong" or "failed" where there are no figures, else nothing."""
    return (record["problem"] or "").partition(":")[0]


def ran(records: Iterable[Record]) -> list[Record]:
    """Without those that could not be run here, or were not wanted."""
    return [record for record in records if not (record["problem"] or "").startswith("not run")]


def tables(result: Record) -> list["Table"]:
    """What ran, one table a part; made for a terminal of 80 columns."""
    made = []
    for part, title in (
        ("shapes", "Shapes"),
        ("lengths", f"Against the length: one sequence, and {result['constant_tokens']:,} tokens"),
    ):
        rows = [[record["shape"]["label"], _short(record), *_cells(record)] for record in ran(result[part])]
        made.append(_table(title, ["shape", "", "forward ms", "with backward", "× least", "MiB", "error"], rows))
    steps = [
        [str(r["shape"]["B"]), _short(r), verdict(r) or f"{1e6 * r['seconds']:,.1f}"] for r in ran(result["decoding"])
    ]
    made.append(_table("One decoding step", ["sequences", "", "µs"], steps))
    starts = [
        [_short(r), *([verdict(r)] if verdict(r) else [f"{r[k]['seconds']:.1f}" for k in ("first", "second")])]
        for r in ran(result["cold_start"])
    ]
    made.append(_table("New process, seconds to the first gradients", ["", "empty caches", "filled caches"], starts))
    return [table for table in made if table.row_count]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "shape") else "right", no_wrap=column == "shape")
    for row in rows:
        table.add_row(*row)
    return table


def _short(record: Record) -> str:
    """As `--peers` calls it; "auto" with its backend."""
    name = record["implementation"]
    return f"{name} ({record['backend']})" if name == "auto" and record.get("backend") else name


def _cells(record: Record) -> list[str]:
    if short := verdict(record):
        return [short]
    forward, both = record["forward"], record["forward_backward"]
    memory = peak(both)
    return [
        milliseconds(forward),
        milliseconds(both),
        f"{both['times_the_least']:.1f}" if "times_the_least" in both else "",
        "" if memory is None else f"{memory:,.0f}",
        f"{largest_error(record):.0e}",
    ]
