"""What the operator's kernels move and what lies in memory, beside what was measured, as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told
from benchmarks.operator_table import sources

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
WANTED = {
    "1.3B-8x2048": {"forward": 4.0, "forward_backward": 4.5},
    "340M-8x2048": {"forward": 4.0, "forward_backward": 4.0},
}
"""How many times as fast as FLA the operator is wanted to be."""
HELD = {
    "o": "the output",
    "until": "sums of gates",
    "scaled": "s e^-G, or s e^(G_B - G)",
    "levels": "which references occur in a block",
    "p": "the softmax",
    "lse": "its log-sum",
    "hk": "K̃ between chunks",
    "hv": "Ṽ between chunks, then its gradients",
    "dq": "",
    "dk": "",
    "dv": "until it is written: gradients of K̃, dℓ, dℓ e^G",
    "dg": "until it is written: dℓ ∘ ℓ + p ∘ dp",
    "read_p": "p e^G",
    "passed": "⟨dh, h⟩",
    "written": "ds from tokens of the chunk",
    "carried": "ds from the state behind it",
}
"""What stands in memory, by the names of `benchmarks.operator_bytes`."""


def moved(result: dict[str, Any], measured: dict[str, Any]) -> str:
    """Bytes of every kernel, read and written once, and the time that the device's copy takes for as many.

    Args:
        result: of `benchmarks.operator_bytes`.
        measured: of `flash-gsa bench op`: the copy, and times of the operator and of FLA.
    """
    shapes = result["shapes"]
    speed = measured["ceilings"]["copy"]["bytes_per_second"]

    def cells(read: float | None, written: float | None, both: float) -> list[str]:
        apart = ["" if size is None else f"{size / 1e6:,.0f}" for size in (read, written)]
        return [*apart, f"{1e6 * both / speed:,.0f}"]

    def of_each(kernels: list[dict[str, int]]) -> list[str]:
        return [cell for k in kernels for cell in cells(k["read"], k["written"], k["read"] + k["written"])]

    header = ["MB", *(title for s in shapes for title in (f"{s['shape']['label']}: read", "written", "µs"))]
    rows = []
    for i, kernel in enumerate(shapes[0]["kernels"]):
        again = sum(k["kernel"] == kernel["kernel"] for k in shapes[0]["kernels"][:i])
        name = f"`{kernel['kernel']}`{', values' if again else ''}"
        rows.append([name, *of_each([s["kernels"][i] for s in shapes])])
    whole = [{key: sum(k[key] for k in s["kernels"]) for key in ("read", "written")} for s in shapes]
    rows.append(["**as cut**, forward alone", *of_each([s["forward_alone"] for s in shapes])])
    rows.append(["**as cut**, forward + backward", *of_each(whole)])
    for key, said in PASSES.items():
        once = [
            cell
            for s in shapes
            for cell in ["", f"{s['once'][key] / 1e6:,.0f}", f"{1e6 * s['once'][key] / speed:,.0f}"]
        ]
        rows.append([f"everything once, {said}", *once])
    for key, said in PASSES.items():
        times = [_microseconds(measured, s["shape"]["label"], "auto", key) for s in shapes]
        rows.append([f"measured, {said}", *_last(times)])
    for key, said in PASSES.items():
        wanted = [_wanted(measured, s["shape"]["label"], key) for s in shapes]
        factors = dict.fromkeys(f"{WANTED[s['shape']['label']][key]:g}" for s in shapes)
        rows.append([f"FLA's {said}, over {' and '.join(factors)}", *_last(wanted)])
    cut = ", ".join(dict.fromkeys(f"{s['C']} by {s['BT']}" for s in shapes))
    notes = (
        f"Each tensor counts once a launch, in {shapes[0]['dtype']}, chunks {cut}. µs: at the {speed / 1e9:,.0f} GB/s "
        "of the copy measured beside the times. A forward alone does not keep the softmax and its log-sums. Measured "
        "times are those of CUDA graphs where there are any."
    )
    return "\n\n".join([table(header, rows), notes, told(result["about"]), sources(measured)])


def held(result: dict[str, Any], measured: dict[str, Any]) -> str:
    """What lies in memory at the worst moment of a backward; arguments as `moved`."""
    shapes = result["shapes"]
    labels = [s["shape"]["label"] for s in shapes]
    tensors = [s["memory"]["tensors"] for s in shapes]
    rows = [
        [f"`{name}`", said, *(f"{t[name] / 2**20:,.2f}" for t in tensors)]
        for name, said in HELD.items()
        if any(name in t for t in tensors)
    ]
    assert all(t.keys() <= HELD.keys() for t in tensors), "a tensor without words"
    rows.append(["**sum**", "", *(f"**{sum(t.values()) / 2**20:,.2f}**" for t in tensors)])
    for title, name, share in (("measured", "auto", 1), ("half of FLA's, measured", "fla", 2)):
        found = [_peak(measured, label, name) for label in labels]
        rows.append([title, "", *("–" if size is None else f"{size / share / 2**20:,.2f}" for size in found)])
    for policy in shapes[0]["kept"]:
        kept = [f"{s['kept'][policy] / 2**20:,.2f}" for s in shapes]
        rows.append([f'kept between the two, `states="{policy}"`', "with the output", *kept])
    at = " and ".join(dict.fromkeys(f"`{s['memory']['kernel']}`" for s in shapes))
    notes = (
        f"MiB above the inputs and the gradient of o while {at} runs, the worst moment of a forward and backward, "
        "whatever the policy; what is kept between the two lies there once for every layer of a model."
    )
    return "\n\n".join([table(["MiB", "", *labels], rows), notes, told(result["about"]), sources(measured)])


def _record(measured: dict[str, Any], label: str, name: str) -> dict[str, Any] | None:
    for record in measured["shapes"]:
        if (record["shape"]["label"], record["implementation"], record["problem"]) == (label, name, None):
            return record
    return None


def _microseconds(measured: dict[str, Any], label: str, name: str, key: str) -> float | None:
    """In a CUDA graph where there is one: what the device takes, whatever the processor."""
    record = _record(measured, label, name)
    return None if record is None else 1e6 * record.get("in_graph", record)[key]["seconds"]


def _wanted(measured: dict[str, Any], label: str, key: str) -> float | None:
    theirs = _microseconds(measured, label, "fla", key)
    return None if theirs is None else theirs / WANTED[label][key]


def _peak(measured: dict[str, Any], label: str, name: str) -> int | None:
    record = _record(measured, label, name)
    return None if record is None else record["forward_backward"]["peak_bytes"]


def _last(times: list[float | None]) -> list[str]:
    """Cells of shapes that have only a time."""
    return [cell for time in times for cell in ("", "", "–" if time is None else f"{time:,.0f}")]
