"""The report of a run: report.html, one page with its figures, pictures and events, readable without a network.

It is made from what the run's folder holds (recipe.yaml, metrics.jsonl, about.json), so also of a run that is not
finished, or was made on another machine.
"""

import base64
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import METRICS_FILE
from flash_gsa.training.plots import Records, duration, of_kind, report_pictures, run_records
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.run_folder import RECIPE_FILE
from flash_gsa.training.starts import read_starts

REPORT_FILE = "report.html"
_THOUSANDS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run's folder, in place of an older one.

    The template is `report.html` beside this file; pictures are inside the page.

    Returns:
        The path of the page.

    Raises:
        UsageError: the folder holds no run or no training step yet, a file of it is damaged, or the page cannot be
            written.
    """
    if not (run_dir / RECIPE_FILE).is_file():
        raise UsageError(f"{run_dir} is not the folder of a run: expected a folder with {RECIPE_FILE} in it")
    records = run_records(run_dir / METRICS_FILE)
    recipe = load_recipe(run_dir / RECIPE_FILE).model_dump(mode="json")
    recipe_text = (run_dir / RECIPE_FILE).read_text(encoding="utf-8")
    starts = read_starts(run_dir)
    last = of_kind(records, "train")[-1]
    resumes = [s["step"] for s in starts[1:] if s["step"] <= last["step"]]
    sections = [
        _section("Figures", _definitions(_figures(records))),
        _section("Over the steps", _pictures(records, resumes)),
        _by_source(records),
        _slots(records),
        _section("Events", _events(records, starts)),
        _section("What it ran on", _machine(starts)),
        f"<section><details><summary>Recipe</summary><pre>{escape(recipe_text)}</pre></details></section>",
    ]
    page = Template(files("flash_gsa.training").joinpath("report.html").read_text("utf-8")).substitute(
        title=escape(run_dir.resolve().name),
        description=escape(f"{recipe['name']}: {recipe['description']}"),
        state=escape(_state(last, recipe)),
        sections="\n".join(s for s in sections if s),
    )
    path = run_dir / REPORT_FILE
    try:
        path.write_text(page, "utf-8")
    except OSError as error:
        raise UsageError(f"the report cannot be written to {path}: {error.strerror}") from None
    return path


def _state(last: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How far the run is, in the terms of its schedule."""
    schedule = recipe["schedule"]
    if schedule.get("minutes"):
        share, planned = last["seconds"] / 60 / schedule["minutes"], f"{schedule['minutes']:g} min"
    elif schedule.get("tokens"):
        share, planned = last["tokens"] / schedule["tokens"], f"{schedule['tokens']:,} tokens"
    else:
        share, planned = last["step"] / schedule["steps"], f"{schedule['steps']:,} steps"
    done = f"Step {last['step']:,}, {last['tokens']:,} tokens, {duration(last['seconds'])}"
    # The last step planned by minutes ends a little before or after them.
    finished = share >= (0.98 if schedule.get("minutes") else 1)
    return f"{done}: all of the planned {planned}." if finished else f"{done}: {share:.0%} of the planned {planned}."


def _figures(records: Records) -> list[tuple[str, str, str]]:
    """Name, value and a remark, of what is told first."""
    train, held_out = of_kind(records, "train"), of_kind(records, "eval")
    last = train[-1]
    found = []
    if held_out:
        score, at = held_out[-1], f"at step {held_out[-1]['step']:,}"
        if "bits_per_byte" in score:
            found.append(("held-out bits per byte", f"{score['bits_per_byte']:.4f}", at))
        if "loss" in score:
            found.append(("held-out loss", f"{score['loss']:.4f}", "nats a token, " + at))
        if "accuracy" in score:
            found.append(("held-out accuracy", f"{score['accuracy']:.4f}", at))
    losses = [r["loss"] for r in train[-max(1, len(train) // 50) :]]
    found += [
        (
            "training loss",
            f"{statistics.fmean(losses):.4f}",
            f"mean of the last {len(losses)} logged" if len(losses) > 1 else "last step",
        ),
        ("tokens", f"{last['tokens']:,}", f"{_count(last['step'], 'step')} of {last['tokens'] // last['step']:,}"),
        ("time", duration(last["seconds"]), "with evaluations and checkpoints"),
    ]
    if speeds := [r["tokens_per_second"] for r in train if "tokens_per_second" in r]:
        overall = f", {last['tokens'] / last['seconds']:,.0f} with all else" if last["seconds"] else ""
        found.append(("tokens a second", f"{statistics.median(speeds):,.0f}", f"median of the steps{overall}"))
    if "flops_per_second" in last:
        flops = last["flops_per_second"] / last["tokens_per_second"]
        remark = "forward and backward, counted from the model's definition: models/flops.py"
        found.append(("model FLOPs a token", _large(flops), remark))
    if shares := [r["mfu"] for r in train if "mfu" in r]:
        found.append(("MFU", f"{statistics.median(shares):.1%}", "median; model FLOPs, dense bf16 peak"))
    if "data_seconds" in last:
        waited = sum(r.get("data_seconds", 0.0) for r in train)
        took = sum(r["tokens"] / r["step"] / r["tokens_per_second"] for r in train if "data_seconds" in r)
        found.append(("waiting for data", f"{waited / took:.1%}", "of the steps' time"))
    if "memory_bytes" in last:
        most = max(r["memory_bytes"] for r in train if "memory_bytes" in r)
        found.append(("memory", f"{most / 2**30:.2f} GiB", "peak of the first process"))
    if "devices" in last:
        found.append(("processes", f"{last['devices']}", f"at step {last['step']:,}"))
    spikes = of_kind(records, "spike")
    found.append(("loss spikes", str(len(spikes)), "listed under events" if spikes else ""))
    return found


def _definitions(figures: Iterable[tuple[str, str, str]]) -> str:
    items = [f"<div><dt>{escape(n)}</dt><dd>{escape(v)}<small>{escape(r)}</small></dd></div>" for n, v, r in figures]
    return f'<dl class="figures">{"".join(items)}</dl>'


def _pictures(records: Records, resumes: Sequence[int]) -> str:
    found = []
    for picture in report_pictures(records, resumes):
        source = base64.b64encode(picture.png).decode("ascii")
        found.append(
            f"<figure><figcaption><h3>{escape(picture.title)}</h3><p>{escape(picture.says)}</p></figcaption>"
            f'<img alt="{escape(picture.title)} over the steps" src="data:image/png;base64,{source}"></figure>'
        )
    return f'<div class="pictures">{"".join(found)}</div>'


def _by_source(records: Records) -> str:
    scored = [r for r in records if r["kind"] == "eval" and r.get("by_source")]
    if not scored or len(scored[-1]["by_source"]) < 2:
        return ""
    shown = [scored[0], scored[-1]] if len(scored) > 1 else scored
    rows = [[name, *(_number(r["by_source"].get(name)) for r in shown)] for name in sorted(scored[-1]["by_source"])]
    first, *last = (f"at step {r['step']:,}" for r in shown)
    return _section("Held-out text by source", _table(["source", f"bits per byte {first}", *last], rows))


def _slots(records: Records) -> str:
    looked = [r for r in records if r["kind"] == "eval" and r.get("slot_entropy")]
    if not looked:
        return ""
    last = looked[-1]
    rows = [
        [layer, _number(last["forgetting"][layer]), _number(entropy), f"{last['dead_slots'][layer]:.1%}"]
        for layer, entropy in sorted(last["slot_entropy"].items(), key=lambda item: int(item[0]))
    ]
    table = _table(["layer", "forgetting", "slot entropy", "dead slots"], rows)
    return _section(f"Slots by layer, at step {last['step']:,}", table)


def _events(records: Records, starts: Sequence[dict[str, Any]]) -> str:
    rows = [(s["step"], [f"{s['step']:,}", "resumed", f"{s['date']} on {s['engine']}"]) for s in starts[1:]]
    for r in of_kind(records, "spike"):
        says = f"loss {r['loss']:.3f}, {r['expected']:.3f} expected, batch {r['batch']}"
        rows.append((r["step"], [f"{r['step']:,}", "loss spike", says]))
    ordered = [row for _, row in sorted(rows, key=lambda row: row[0])]
    return _table(["step", "event", ""], ordered) if ordered else ""


def _machine(starts: Sequence[dict[str, Any]]) -> str:
    """The newest start: of the others, date and engine are among the events."""
    if not starts:
        return ""
    start = starts[-1]
    rows = [
        [key, str(start[key])] for key in ("command", "date", "commit", "engine", "device", "threads") if start[key]
    ]
    rows.append(["versions", ", ".join(f"{name} {number}" for name, number in start["versions"].items())])
    body = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<div class="wide"><table><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are aligned right where their whole column is of numbers."""
    numeric = [
        all(row[i].replace(",", "").replace(".", "").strip("-%").isdigit() for row in rows) for i in range(len(head))
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="number"' if right else "" for right in numeric]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _large(value: float) -> str:
    """ "2.40 G": three figures and the thousands as a letter."""
    letter = next((letter for letter in ("T", "G", "M", "k") if value >= _THOUSANDS[letter]), "")
    return f"{value / _THOUSANDS[letter]:.3g} {letter}".rstrip()


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")
