"""The result of `flash-gsa bench op` as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told
from flash_gsa.benchmarking.plots import STYLES
from flash_gsa.benchmarking.report import NAMES, OPERATIONS, milliseconds, peak, ran, rate, verdict

PASSES = (("forward", "forward"), ("+ backward", "forward_backward"))
LAYERS = ("auto", "separate", "fla")


def operator(result: dict[str, Any]) -> str:
    """A result of `flash-gsa bench op`: shapes, layers, decoding, the start of a process, the device at its best."""
    shapes = _by_label(result["shapes"])
    names = [name for name in STYLES if any(_timed(records.get(name)) for records in shapes.values())]
    other = next((name for name in ("fla", "reference") if name in names), None)
    with_memory = [n for n in ("auto", other) if any(_memory(records.get(n)) for records in shapes.values())]
    best = _timed(result["ceilings"])
    header = ["ms", "", *(["least"] if best else []), *(NAMES[name] for name in names)]
    header += [f"faster than {NAMES[other]}"] if other else []
    header += [f"MiB, {NAMES[name]}" for name in with_memory]
    rows = []
    for label, records in shapes.items():
        for passes, key in PASSES:
            own = _timed(records["auto"])
            row = [label if key == "forward" else "", passes]
            row += [milliseconds({"seconds": own[key]["least_seconds"]}) if own else ""] if best else []
            row += [_cell(records.get(name), key) for name in names]
            row += [_times_faster(own, _timed(records.get(other)), key)] if other else []
            rows.append(row + [_memory(records.get(name), key) for name in with_memory])
    times = table(header, rows) if rows else ""
    parts = (times, _problems(shapes), *_layers(result), _decoding(result), _sentences(result), told(result["about"]))
    return "\n\n".join(part for part in parts if part)


def summary(result: dict[str, Any]) -> str:
    """Of the same result: forward and backward at each shape, beside each of the others."""
    shapes = _by_label(result["shapes"])
    others = [n for n in STYLES if n != "auto" and any(_timed(records.get(n)) for records in shapes.values())]
    header = ["forward + backward, ms", NAMES["auto"], *(cell for n in others for cell in (NAMES[n], "")), "MiB"]
    rows = []
    for label, records in shapes.items():
        row = [label, _cell(records["auto"], "forward_backward")]
        for name in others:
            record = records.get(name)
            row += [_cell(record, "forward_backward")]
            row += [_times_faster(_timed(records["auto"]), _timed(record), "forward_backward")]
        rows.append([*row, _memory(records["auto"])])
    return "\n\n".join([table(header, rows), told(result["about"])])


def _by_label(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{shape: {implementation: record}} of what ran, where this package did."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in ran(records):
        found.setdefault(record["shape"]["label"], {})[record["implementation"]] = record
    return {label: records for label, records in found.items() if "auto" in records}


def _timed(record: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if record is None or record["problem"] else record


def _cell(record: dict[str, Any] | None, key: str) -> str:
    if timed := _timed(record):
        return milliseconds(timed[key])
    return verdict(record) if record else "–"


def _times_faster(own: dict[str, Any] | None, other: dict[str, Any] | None, key: str) -> str:
    return f"**{other[key]['seconds'] / own[key]['seconds']:.1f}×**" if own and other else "–"


def _memory(record: dict[str, Any] | None, key: str = "forward_backward") -> str:
    timed = _timed(record)
    return f"{peak(timed[key]):,.0f}" if timed and timed[key]["peak_bytes"] is not None else ""


def _problems(shapes: dict[str, dict[str, dict[str, Any]]]) -> str:
    return " ".join(
        f"{NAMES[name]} at {label}: {record['problem']}."
        for label, records in shapes.items()
        for name, record in records.items()
        if record["problem"] and name in NAMES
    )


def _layers(result: dict[str, Any]) -> list[str]:
    """The whole layer beside its projections, what surrounds its operator, and what of both has no figures."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in ran(result.get("layer", [])):  # results from before there was this part have none
        found.setdefault((record["operation"], record["shape"]["label"]), {})[record["implementation"]] = record
    ways = {name for (operation, _), records in found.items() if operation != "projections" for name in records}
    names = [name for name in LAYERS if name in ways]
    with_memory = [name for name in names if any(_memory(records.get(name)) for records in found.values())]
    own = [name for name in names if name != "fla"]
    whole, around = [], []
    for (operation, label), records in found.items():
        for passes, key in PASSES:
            title = [f"{label}, {OPERATIONS[operation]}" if key == "forward" else "", passes]
            if operation == "layer":
                floor = found.get(("projections", label), {}).get("auto")
                times = [_cell(floor, key), *(_cell(records.get(name), key) for name in names)]
                whole.append([*title, *times, *(_memory(records.get(name), key) for name in with_memory)])
            elif operation != "projections":
                around.append([*title, *(f(records.get(name), key) for name in own for f in (_cell, _rate))])
    titles = ["projections", *(NAMES[name] for name in names), *(f"MiB, {NAMES[name]}" for name in with_memory)]
    moved = [title for name in own for title in (NAMES[name], "GB/s (of a copy)")]
    tables = [table(["ms", "", *head], rows) for head, rows in ((titles, whole), (moved, around)) if rows]
    return [*tables, _problems({f"{label}, {OPERATIONS[what]}": records for (what, label), records in found.items()})]


def _rate(record: dict[str, Any] | None, key: str) -> str:
    timed = _timed(record)
    return rate(timed[key]) if timed else ""


def _decoding(result: dict[str, Any]) -> str:
    steps: dict[int, dict[str, dict[str, Any]]] = {}
    for record in result["decoding"]:
        if _timed(record):
            steps.setdefault(record["shape"]["B"], {})[record["implementation"]] = record
    if not steps:
        return ""
    names = [name for name in NAMES if any(name in records for records in steps.values())]
    rows = [
        [str(batch), *(f"{1e6 * records[n]['seconds']:,.1f}" if n in records else "–" for n in names)]
        for batch, records in steps.items()
    ]
    return table(["µs, one decoding step of so many sequences", *(NAMES[name] for name in names)], rows)


def _sentences(result: dict[str, Any]) -> str:
    used = dict.fromkeys(r["backend"] for r in result["shapes"] if r["implementation"] == "auto" and _timed(r))
    said = ["flash-gsa runs on its backend " + ", ".join(f"`{name}`" for name in used) + "."] if used else []
    for record in result["cold_start"]:
        if _timed(record):
            said.append(
                f"From the import to the first gradients, {NAMES[record['implementation']]} takes "
                f"{record['first']['seconds']:.0f} s with empty caches and {record['second']['seconds']:.0f} s with "
                "filled ones."
            )
    if ceilings := _timed(result["ceilings"]):
        copied, product = ceilings["copy"], ceilings["product"]
        said.append(
            f"The device copies {copied['bytes_per_second'] / 1e9:,.0f} GB/s (read and written), which makes *least*, "
            f"and multiplies {product['dtype']} matrices of {product['size']}² at "
            f"{_flops(product['flops_per_second'])}."
        )
    return " ".join(said)


def _flops(per_second: float) -> str:
    return f"{per_second / 1e12:.3g} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:.3g} GFLOP/s"
