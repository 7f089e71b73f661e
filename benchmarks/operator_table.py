"""The result of `flash-gsa bench op` as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told
from flash_gsa.benchmarking.op import IN_GRAPH
from flash_gsa.benchmarking.plots import STYLES
from flash_gsa.benchmarking.report import NAMES, OPERATIONS, digits, milliseconds, peak, ran, rate, verdict

PASSES = (("forward", "forward"), ("+ backward", "forward_backward"))
LAYERS = ("auto", "separate", "fla")
SHORTEST = 2048
"""From so many tokens a sequence on, time shall be linear in the length."""
WAITING = 0.1
"""By so much a call may take longer than its CUDA graph before it counts as bound by launches."""


def sources(result: dict[str, Any]) -> str:
    """Where the figures come from: command, device, versions, date and commit of each result."""
    return "\n\n".join(told(about) for about in (result["about"], *result.get("also", ())))


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
    parts = (
        times,
        _in_graphs(shapes),
        _recomputed(shapes),
        _problems(shapes),
        *_layers(result),
        _decoding(result),
        _sentences(result),
    )
    return "\n\n".join(part for part in (*parts, sources(result)) if part)


def summary(result: dict[str, Any]) -> str:
    """Of the same result: forward and backward at each shape, beside each of the others; and in CUDA graphs."""
    shapes = _by_label(result["shapes"])
    others = [n for n in STYLES if n != "auto" and any(_timed(records.get(n)) for records in shapes.values())]
    in_graphs = any(record.get("in_graph") for records in shapes.values() for record in records.values())
    header = ["forward + backward, ms", NAMES["auto"], *(cell for n in others for cell in (NAMES[n], ""))]
    header += [*(f"{NAMES[name]}, in a CUDA graph" for name in ("auto", "fla")), ""] if in_graphs else []
    header += ["MiB"]
    rows = []
    for label, records in shapes.items():
        key = "forward_backward"
        row = [label, _cell(records["auto"], key)]
        for name in others:
            record = records.get(name)
            row += [_cell(record, key), _times_faster(_timed(records["auto"]), _timed(record), key)]
        if in_graphs:
            own, other = (records.get(name, {}).get("in_graph") for name in ("auto", "fla"))
            row += [
                *(milliseconds(cost[key]) if cost else "–" for cost in (own, other)),
                _times_faster(own, other, key),
            ]
        rows.append([*row, _memory(records["auto"])])
    return "\n\n".join([table(header, rows), sources(result)])


def lengths(result: dict[str, Any]) -> str:
    """Of the same result: our time a token against the length, for one sequence and for a constant number of tokens."""
    records = [r for r in result["lengths"] if r["implementation"] == "auto" and _timed(r)]
    tokens = result["constant_tokens"]
    one = {r["shape"]["T"]: r for r in records if r["shape"]["B"] == 1}
    many = {r["shape"]["T"]: r for r in records if r["shape"]["B"] * r["shape"]["T"] == tokens}
    graphs = any("in_graph" in r for r in records)
    header = ["ns a token, sequences of"]
    for passes, _ in PASSES:
        header += [f"{passes}: one", *(["one, in a graph"] if graphs else []), f"{tokens:,} tokens"]
    rows = []
    for T in sorted({*one, *many}):
        row = [f"{T:,}"]
        for _, key in PASSES:
            row += [_token(one.get(T), key)]
            row += [_token((one.get(T) or {}).get("in_graph"), key, T)] if graphs else []
            row += [_token(many.get(T), key)]
        rows.append(row)
    parts = [table(header, rows), _spread(one, many, tokens), *_bound_by_launches(one), told(result["about"])]
    return "\n\n".join(part for part in parts if part)


def _token(record: dict[str, Any] | None, key: str, tokens: int | None = None) -> str:
    return digits(_nanoseconds(record, key, tokens)) if record else ""


def _nanoseconds(record: dict[str, Any], key: str, tokens: int | None = None) -> float:
    """Of one of the `tokens`, by default those of the record's shape."""
    return 1e9 * record[key]["seconds"] / (tokens or record["shape"]["B"] * record["shape"]["T"])


def _spread(one: dict[int, dict[str, Any]], many: dict[int, dict[str, Any]], tokens: int) -> str:
    """The largest time a token over the smallest, where a call has enough tokens to fill the chip."""
    cut = [r for length, r in many.items() if length >= SHORTEST] or list(many.values())
    long = [r for length, r in one.items() if length >= tokens]
    rows = []
    for title, group in (
        (f"{tokens:,} tokens, cut into sequences", cut),
        (f"one sequence of {tokens:,} or more", long),
        ("all of these", [*cut, *long]),
    ):
        if len(group) > 1:
            found = [[_nanoseconds(r, key) for r in group] for _, key in PASSES]
            rows.append([title, *(f"{100 * (max(times) / min(times) - 1):.1f} %" for times in found)])
    shortest = min((r["shape"]["T"] for r in cut), default=0)
    heads = [f"largest time a token over the smallest, less 1, from {shortest:,} tokens a sequence on"]
    return table([*heads, *(passes for passes, _ in PASSES)], rows) if rows else ""


def _bound_by_launches(one: dict[int, dict[str, Any]]) -> list[str]:
    """Up to which length of one sequence the device waits for the host, where that was measured."""
    said = []
    for passes, key in PASSES:
        slower = {T: r[key]["seconds"] / r["in_graph"][key]["seconds"] - 1 for T, r in one.items() if "in_graph" in r}
        waiting = [T for T, share in slower.items() if share > WAITING]
        if waiting:
            said.append(f"{passes} up to {max(waiting):,} tokens")
    if not any("in_graph" in r for r in one.values()):
        return []
    bound = f"Launches from the host bound one sequence ({WAITING:.0%} and more above its graph): "
    unfilled = (
        "What a graph takes a token more than a longer sequence is a chip that is not full, and from the length on "
        "that is cut into segments what each of these adds alone, for which it is walked once more."
    )
    return [f"{bound}{', '.join(said) or 'at no length'}. {unfilled}"]


def _in_graphs(shapes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The same times in CUDA graphs, where no processor is waited for; and why there are none."""
    rows, problems = [], []
    timed = {name for records in shapes.values() for name, record in records.items() if record.get("in_graph")}
    names = [name for name in IN_GRAPH if name in timed]
    for label, records in shapes.items():
        costs = {name: record.get("in_graph") for name, record in records.items()}
        problems += [
            f"{NAMES[name]} at {label} in a CUDA graph: {record['graph_problem']}."
            for name, record in records.items()
            if "graph_problem" in record
        ]
        if not costs["auto"]:
            continue
        for passes, key in PASSES:
            cells = [milliseconds(costs[name][key]) if costs.get(name) else "–" for name in names]
            title = label if key == "forward" else ""
            rows.append([title, passes, *cells, _times_faster(costs["auto"], costs.get("fla"), key)])
    header = ["ms, in a CUDA graph", "", *(NAMES[name] for name in names), f"faster than {NAMES['fla']}"]
    return "\n\n".join([*([table(header, rows)] if rows else []), *([" ".join(problems)] if problems else [])])


def _recomputed(shapes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What it costs and saves to compute the states before chunks again in the backward."""
    names = ("auto", "recompute", "fla")
    rows = [
        [label, *(_cell(records.get(name), "forward_backward") for name in names[:2])]
        + [_memory(records.get(name)) for name in names]
        for label, records in shapes.items()
        if "recompute" in records
    ]
    titles = [NAMES[name] for name in names]
    header = ["forward + backward, ms", *titles[:2], *(f"MiB, {title}" for title in titles)]
    return table(header, rows) if rows else ""


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
    in_graphs = _layers_in_graphs(found, names)
    moved = [title for name in own for title in (NAMES[name], "GB/s (of a copy)")]
    tables = [table(["ms", "", *head], rows) for head, rows in ((titles, whole), (moved, around)) if rows]
    tables[1:1] = [in_graphs] if in_graphs else []
    return [*tables, _problems({f"{label}, {OPERATIONS[what]}": records for (what, label), records in found.items()})]


def _layers_in_graphs(found: dict[tuple[str, str], dict[str, dict[str, Any]]], names: list[str]) -> str:
    """The whole layer again, in CUDA graphs; results from before there were these have none."""
    rows = []
    for (operation, label), records in found.items():
        costs = [found.get(("projections", label), {}).get("auto"), *(records.get(name) for name in names)]
        costs = [(record or {}).get("in_graph") for record in costs]
        if operation == "layer" and any(costs[1:]):
            for passes, key in PASSES:
                title = label if key == "forward" else ""
                rows.append([title, passes, *(milliseconds(cost[key]) if cost else "–" for cost in costs)])
    header = ["ms, the layer in a CUDA graph", "", "projections", *(NAMES[name] for name in names)]
    return table(header, rows) if rows else ""


def _rate(record: dict[str, Any] | None, key: str) -> str:
    timed = _timed(record)
    return rate(timed[key]) if timed else ""


def _decoding(result: dict[str, Any]) -> str:
    steps: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for record in result["decoding"]:
        if _timed(record):
            key = record["shape"]["name"], record.get("state", "float32"), record["shape"]["B"]
            steps.setdefault(key, {})[record["implementation"]] = record
    if not steps:
        return ""
    names = [name for name in NAMES if any(name in records for records in steps.values())]
    speed = best["copy"]["bytes_per_second"] if (best := _timed(result["ceilings"])) else None
    rows = []
    for (layer, state, batch), records in steps.items():
        row = [f"{layer}, states in {state}", str(batch)]
        row += [f"{1e6 * records[n]['seconds']:,.1f}" if n in records else "–" for n in names]
        if speed is not None:
            least = 2 * next(iter(records.values()))["state_bytes"] / speed
            row += [f"{1e6 * least:,.1f}", f"{records['auto']['seconds'] / least:.2f}" if "auto" in records else "–"]
        rows.append(row)
    header = ["µs, one decoding step", "sequences", *(NAMES[name] for name in names)]
    header += [] if speed is None else ["states read and written", f"{NAMES['auto']}, times that"]
    return table(header, rows)


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
