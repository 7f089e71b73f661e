"""A result in words: one line a measurement while it runs, tables at the end."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]

NAMES = {
    "copy": "copy of the state",
    "auto": "flash-gsa",
    "recompute": "flash-gsa, recompute",
    "separate": "flash-gsa, separate",
    "fla": "FLA",
    "sdpa-cudnn": "softmax, cuDNN",
    "sdpa-flash": "softmax, flash",
    "reference": "the recurrence",
}
OPERATIONS = {
    "projections": "the projections alone",
    "layer": "the layer",
    "silu": "SiLU of q, k, v",
    "gates": "log gates",
    "abc_gates": "ABC's gates",
    "norm": "SiLU and RMSNorm of o",
}
"""What is measured of a layer, by the names in a result."""
LEGEND = (
    "× least: with backward, how many times longer than a copy of the bytes that must be read and written. "
    "× projections: how many times longer than these alone. GB/s: of bytes that must be read and written (and "
    "which part of a copy's). "
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
    return digits(1e3 * cost["seconds"])


def peak(cost: Record) -> float | None:
    """MiB above the inputs, or None where memory is not measured."""
    return None if cost["peak_bytes"] is None else cost["peak_bytes"] / 2**20


def rate(cost: Record) -> str:
    """GB/s at which it moved what must be moved; where the copy was measured, also as a part of it: "1,530 (61%)"."""
    moved = digits(cost["least_bytes"] / cost["seconds"] / 1e9)
    return f"{moved} ({1 / cost['times_the_least']:.0%})" if "times_the_least" in cost else moved


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


def combined(result: Record, *later: Record) -> Record:
    """One result of `bench op` of several: of what a later one has, its records: shapes, decoding, lengths, a start.

    A command that may take only so long measures a part, another one the others.
    """
    found = result | {"also": [other["about"] for other in later]}
    for other in later:
        labels = {record["shape"]["label"] for record in other["shapes"]}
        kept = [record for record in found["shapes"] if record["shape"]["label"] not in labels]
        found["shapes"] = kept + other["shapes"]
        for part in ("decoding", "lengths", "cold_start"):
            found[part] = ran(other[part]) or found[part]
    return found


def tables(result: Record) -> list["Table"]:
    """What ran, one table a part; made for a terminal of 80 columns."""
    made = []
    for part, title in (
        ("shapes", "Shapes"),
        ("lengths", f"Against the length: one sequence, and {result['constant_tokens']:,} tokens"),
    ):
        rows = [[r["shape"]["label"], _short(r), *_cells(r, _times_the_least(r))] for r in ran(result[part])]
        made.append(_table(title, ["shape", "", "forward ms", "with backward", "× least", "MiB", "error"], rows))
    made += _layer_tables(ran(result["layer"]))
    steps = [
        [r["shape"]["name"], r["state"], str(r["shape"]["B"]), _short(r), verdict(r) or f"{1e6 * r['seconds']:,.1f}"]
        for r in ran(result["decoding"])
    ]
    made.append(_table("One decoding step", ["layer", "state", "sequences", "", "µs"], steps))
    starts = [
        [_short(r), *([verdict(r)] if verdict(r) else [f"{r[k]['seconds']:.1f}" for k in ("first", "second")])]
        for r in ran(result["cold_start"])
    ]
    made.append(_table("New process, seconds to the first gradients", ["", "empty caches", "filled caches"], starts))
    return [table for table in made if table.row_count]


def _layer_tables(records: list[Record]) -> list["Table"]:
    floors = {r["shape"]["label"]: r for r in records if r["operation"] == "projections" and not verdict(r)}
    whole, around = [], []
    for r in records:
        label, operation = r["shape"]["label"], r["operation"]
        if operation in ("projections", "layer"):
            name = _short(r) if operation == "layer" else operation
            whole.append([label, name, *_cells(r, _times(r, floors.get(label)))])
        else:
            around.append([label, f"{operation} {r['implementation']}", *_moving_cells(r)])
    columns = ["shape", "", "forward ms", "with backward", "× projections", "MiB", "error"]
    moving = ["shape", "", "forward ms", "GB/s", "with backward", "GB/s", "error"]
    return [_table("The layer", columns, whole), _table("Around the operator", moving, around)]


def digits(value: float) -> str:
    """Three of them: "0.123", "12.3", "1,234"."""
    return f"{value:#.3g}" if value < 99.95 else f"{value:,.0f}"


def _table(title: str, columns: list[str], rows: list[list[str]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in columns:
        names = column in ("", "shape")
        table.add_column(column, justify="left" if names else "right", no_wrap=names)
    for row in rows:
        table.add_row(*row)
    return table


def _short(record: Record) -> str:
    """As `--peers` calls it; "auto" with its backend."""
    name = record["implementation"]
    return f"{name} ({record['backend']})" if name == "auto" and record.get("backend") else name


def _times_the_least(record: Record) -> str:
    times = record.get("forward_backward", {}).get("times_the_least")
    return "" if times is None else f"{times:.1f}"


def _times(record: Record, floor: Record | None) -> str:
    if floor is None or verdict(record):
        return ""
    return f"{record['forward_backward']['seconds'] / floor['forward_backward']['seconds']:.2f}"


def _cells(record: Record, ratio: str) -> list[str]:
    if short := verdict(record):
        return [short]
    forward, both = record["forward"], record["forward_backward"]
    memory = peak(both)
    return [
        milliseconds(forward),
        milliseconds(both),
        ratio,
        "" if memory is None else f"{memory:,.0f}",
        f"{largest_error(record):.0e}",
    ]


def _moving_cells(record: Record) -> list[str]:
    if short := verdict(record):
        return [short]
    costs = (record["forward"], record["forward_backward"])
    return [*(cell for cost in costs for cell in (milliseconds(cost), rate(cost))), f"{largest_error(record):.0e}"]
