"""The result of `flash-gsa bench train` as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told
from flash_gsa.benchmarking.report import verdict
from flash_gsa.benchmarking.train_report import gibibytes, named, times_fla

Record = dict[str, Any]


def training(result: Record) -> str:
    """Speed, share of the peak and memory against the length; parts of a step; the first step; where the time goes."""
    parts = [_speeds(result), _memory(result), _steps(result), *map(_profile, result["profile"])]
    return "\n\n".join(part for part in (*parts, _sentences(result), told(result["about"])) if part)


def training_summary(result: Record) -> str:
    """Of the same result: tokens a second against the length."""
    return "\n\n".join([_speeds(result), told(result["about"])])


def _shown(result: Record) -> tuple[list[str], dict[str, dict[str, Record]]]:
    """(who, in order; {rows × length: {who: record}}) of what ran or should have."""
    found: dict[str, dict[str, Record]] = {}
    for record in sorted(result["steps"], key=lambda r: r["length"]):
        if not (record["problem"] or "").startswith("not run"):
            found.setdefault(f"{record['rows']}×{record['length']}", {})[named(record)] = record
    names = [named(record) for record in result["steps"]]
    return [n for n in dict.fromkeys(names) if any(n in records for records in found.values())], found


def _speeds(result: Record) -> str:
    names, found = _shown(result)
    rows = []
    for label, records in found.items():
        row = [label]
        for name in names:
            record = records.get(name)
            if record is None or record["problem"]:
                row.append(verdict(record) if record else "–")
                continue
            ratio = times_fla(record, result["steps"])
            row.append(f"{record['tokens_per_second']:,.0f}" + ("" if ratio is None else f" (**{ratio:.2f}×**)"))
        rows.append(row)
    compared = any("×**" in cell for row in rows for cell in row)
    heading = "tokens/s" + (" (times those of FLA)" if compared else "")
    return table([heading, *names], rows)


def _memory(result: Record) -> str:
    names, found = _shown(result)
    rows = [
        [
            label,
            *(gibibytes(r["peak_bytes"]) if (r := records.get(name)) and "peak_bytes" in r else "–" for name in names),
        ]
        for label, records in found.items()
    ]
    return table(["peak memory, GiB", *names], rows) if any(set(row[1:]) != {"–"} for row in rows) else ""


def _steps(result: Record) -> str:
    """A line for everyone at every length."""
    rows = []
    shown = sorted((r for r in result["steps"] if not r["problem"]), key=lambda r: r["length"])
    metered = any("power" in r for r in shown)
    for r in shown:
        parts = [f"{1e3 * seconds:,.1f}" for seconds in r.get("parts", {}).values()] or ["–"] * 3
        shares = [f"{r[key]:.1%}" if key in r else "–" for key in ("mfu", "share_of_product")]
        power = _power(r) if metered else []
        rows.append([f"{named(r)}, {r['rows']}×{r['length']}", *parts, f"{1e3 * r['seconds']:,.1f}", *shares, *power])
    heads = [
        "ms",
        "forward and loss",
        "backward",
        "optimiser",
        "a step",
        "of the data sheet (MFU)",
        "of a product here",
        *(POWER if metered else ()),
    ]
    return table(heads, rows) if rows else ""


POWER = ("watts", "limited by power, % of the time", "MHz", "mJ a token")


def _power(record: Record) -> list[str]:
    """Cells for POWER: what the card draws of its limit, and at which clock."""
    if (power := record.get("power")) is None:
        return ["–"] * len(POWER)
    tokens = record["rows"] * record["length"] * record["steps"]
    return [
        f"{power['watts']:.0f} of {power['limit_watts']:.0f}",
        f"{100 * power['power_capped']:.0f}",
        f"{power['sm_mhz']:,.0f} of {power['most_sm_mhz']:,.0f}",
        f"{1e3 * power['joules'] / tokens:.1f}",
    ]


def _at_power(record: Record) -> str:
    if (power := record.get("power")) is None:
        return ""
    return (
        f", {power['sm_mhz']:,.0f} MHz and {power['watts']:.0f} of {power['limit_watts']:.0f} W, limited by power in "
        f"{power['power_capped']:.0%} of the time"
    )


def _profile(record: Record) -> str:
    if record["problem"]:
        return ""
    rows = [
        [row["category"], f"{row['calls']:,.0f}", f"{row['milliseconds']:.2f}", f"{row['share']:.1%}"]
        for row in record["categories"]
    ]
    return table(
        [f"kernels of {named(record)}, {record['rows']}×{record['length']}", "calls", "ms a step", "share"], rows
    )


def _sentences(result: Record) -> str:
    size = result["size"]
    said = [
        f"Models of {size['name']}: {size['layers']} blocks, {size['hidden']} wide, {size['vocabulary']:,} tokens in "
        f"the vocabulary; {result['tokens']:,} tokens a step; {result['precision']}."
    ]
    for record in result["cold_start"]:
        if not record["problem"]:
            first, second = record["first"]["first_step_seconds"], record["second"]["first_step_seconds"]
            said.append(
                f"The first step of {named(record)} takes {first:.0f} s in a new process with empty caches, "
                f"{second:.0f} s with filled ones."
            )
    if (ceilings := result["ceilings"]) and not ceilings["problem"]:
        copied, product = ceilings["copy"]["bytes_per_second"], ceilings["product"]
        said.append(
            f"The device copies {copied / 1e9:,.0f} GB/s (read and written) and multiplies "
            f"{product['dtype']} matrices of {product['size']}² at {product['flops_per_second'] / 1e12:.3g} TFLOP/s"
            f"{_at_power(product)}."
        )
    failed = [r for r in result["steps"] if r["problem"] and not r["problem"].startswith("not run")]
    said += [f"{named(r)} at {r['rows']}×{r['length']}: {r['problem']}." for r in failed]
    return " ".join(said)
