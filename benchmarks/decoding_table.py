"""What a decoding step does for a number of the state, and how it was split, as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told

Row = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2}


def splits(result: dict[str, Any]) -> str:
    """Of both kernels, the split that is chosen beside the one before it and the best of its run.

    Args:
        result: rows of sweeps. Rows of one `run` were timed on one machine, one after the other; the best of a row's
            `microseconds` counts.
    """
    slots, linear = ([r for r in result["rows"] if r["kernel"] == kernel] for kernel in ("step_slots", "step_linear"))
    of_pytorch = {(r["run"], *_case(r)): r for r in result["rows"] if r["kernel"] == "PyTorch"}
    beside = {(r["run"], *_case(r)): r for r in linear if "tile" not in r or r.get("chosen")}
    rows = []
    for case, (before, now, best, tried) in _compared(slots).items():
        layer, state, sequences = case
        rows.append([f"{layer}, states in {state}", f"{sequences:,}", _moved(now, result)])
        rows[-1] += [*(_cell(r) for r in (before, now, best)), str(tried)]
    heads = ["µs, slots", "sequences", "to move the states", "as split before", "as split now"]
    parts = [table([*heads, "best that was tried", "tried"], rows)]
    rows = []
    for case, (before, now, best, _) in _compared(linear).items():
        layer, _, sequences = case
        rows.append([layer, f"{sequences:,}", _moved(now, result)])
        rows[-1] += [_cell(r) for r in (before, now, best)]
    heads = ["µs, gated linear attention", "sequences", "to move the states", "as split before", "as split now"]
    parts.append(table([*heads, "best that was tried"], rows))
    rows = []
    for key, there in of_pytorch.items():
        here = beside[key]  # of the same run: as split then, or as is chosen
        times = f"{_took(there):.1f}", f"{_took(here):.1f}", f"{_took(there) / _took(here):.1f}×"
        rows.append([here["layer"], f"{here['sequences']:,}", _moved(here, result), *times])
    heads = ["µs, gated linear attention", "sequences", "to move the states", "PyTorch", "here", "faster"]
    parts.append(table(heads, rows))
    parts.append("In brackets: programs a head × numbers of a tile / warps, stages.")
    return "\n\n".join([*parts, *(told(about) for about in (result["about"], *result.get("later", ())))])


def instructions(result: dict[str, Any], measured: dict[str, Any], sweeps: dict[str, Any]) -> str:
    """Beside what the kernels of its commits took.

    Args:
        result: of `benchmarks.step_instructions`.
        measured: of `flash-gsa bench op`, with decoding.
        sweeps: as `splits` takes them.
    """
    copied = measured["ceilings"]["copy"]["bytes_per_second"]
    took = {
        (r["commit"][:7], *_case(r)): 1e-6 * _took(r)
        for r in sweeps["rows"]
        if r["kernel"] == "step_slots" and ("tile" not in r or r.get("chosen_before"))
    }
    took |= {
        (measured["about"]["commit"][:7], r["shape"]["name"], r.get("state", "float32"), r["shape"]["B"]): r["seconds"]
        for r in measured["decoding"]
        if r["implementation"] == "auto" and not r["problem"]
    }
    rows = []
    for r in result["rows"]:
        key = (r["commit"][:7], r["layer"], r["state"], r["sequences"])
        rows.append(
            [
                f"`{key[0]}`, Triton {r['triton']}",
                f"{r['layer']}, states in {r['state']}",
                *(f"{r['registers']}", f"{r['warps']}", f"{r['instructions_a_number']:.1f}"),
                *(f"{1e6 * seconds:,.0f}" for seconds in (r["issue_seconds"], r["bytes"] / copied)),
                f"{1e6 * took[key]:,.0f}" if key in took else "",
            ]
        )
    heads = ["commit", "", "registers", "warps at a time", "instructions a number", "µs to issue them"]
    heads += ["µs to move the state", f"µs measured, {result['rows'][0]['sequences']:,} sequences"]
    return "\n\n".join([table(heads, rows), *(told(source["about"]) for source in (result, measured, sweeps))])


def _compared(rows: list[Row]) -> dict[tuple[str, str, int], tuple[Row | None, Row, Row, int]]:
    """The split before, where its run has it, the one that is chosen, the best of all, and how many there were.

    Of the run of a case that has the first two; else of one with the second, with the most tried.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "tile" in row:
            found.setdefault((row["run"], *_case(row)), []).append(row)
    compared: dict[Any, tuple[Row | None, Row, Row, int]] = {}
    for (_, *case), tried in found.items():
        old, now = (next((r for r in tried if r.get(name)), None) for name in ("chosen_before", "chosen"))
        if now and len(tried) > 1:
            this = old, now, min(tried, key=_took), len(tried)
            compared[tuple(case)] = max(compared.get(tuple(case), this), this, key=lambda x: (x[0] is not None, x[3]))
    return dict(sorted(compared.items()))


def _case(row: Row) -> tuple[str, str, int]:
    return row["layer"], row["state"], row["sequences"]


def _took(row: Row) -> float:
    return min(row["microseconds"])


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{_took(row):.1f} ({row['programs']} × {row['tile']:,} / {row['warps']}, {row['stages']})"


def _moved(row: Row, result: dict[str, Any]) -> str:
    """What all numbers of the states of a row's case take, read and written, at the speed of a copy."""
    a_head = row["slots"] * (row["keys"] + row["values"]) if "slots" in row else row["keys"] * row["values"]
    moved = 2 * row["sequences"] * row["heads"] * a_head * BYTES[row["state"]]
    return f"{1e6 * moved / result['bytes_per_second']:.1f}"
