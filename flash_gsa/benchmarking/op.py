"""The benchmark as a whole: which measurements, in which order, and the result they add up to."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flash_gsa.errors import UsageError, did_you_mean

from . import measurements
from .about import write
from .cold_start import measure_cold_start
from .decoding import measure_decoding
from .layer import measure_layer, measured_of_layers
from .report import told
from .shapes import SUITES, Shape, Suite
from .worker import Failed, TookTooLong, Worker

PARTS = ("ceilings", "shapes", "layer", "decoding", "lengths", "cold_start")
IN_GRAPH = ("auto", "fla", "sdpa-cudnn", "sdpa-flash")
"""Timed in a CUDA graph too, where a slow processor bounds neither."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured, and how thoroughly.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        quick: the whole at tiny sizes.
        shapes: names of shapes ("1.3B-8x2048") or of families ("1.3B"); empty: all there are for the device.
        peers: names of implementations, as in `implementations.implementation_names`; empty: those for the device.
        only: some of PARTS; empty: all.
        budget, repeats: seconds of timed calls a measurement, in how many repeats; None: those for the device.
        limit: seconds after which one measurement is given up.
        minutes: after which no further measurement begins; None: no end.
        cold_fla: time FLA's start with empty caches too.
        command, commit: what the result says of itself; the commit is for code outside a git checkout.

    Raises:
        UsageError: a part that does not exist, or a number that cannot be.
    """

    device: str = "auto"
    quick: bool = False
    shapes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    budget: float | None = None
    repeats: int | None = None
    limit: float = 600.0
    minutes: float | None = None
    cold_fla: bool = False
    command: str = "flash_gsa.benchmarking.op.benchmark"
    commit: str | None = None

    def __post_init__(self) -> None:
        _all_known("part", self.only, PARTS)
        for name, value in (("budget", self.budget), ("limit", self.limit), ("minutes", self.minutes)):
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}; expected a number above 0")
        if self.repeats is not None and self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}; expected 1 or more")
        if self.cold_fla and self.only and "cold_start" not in self.only:
            raise UsageError(f"a cold start is asked for, but not among the parts: {', '.join(self.only)}")


@dataclass(frozen=True)
class Task:
    """One measurement: `function(*arguments)` makes a record of `part`, of which `known` is known before."""

    part: str
    title: str
    function: Callable[..., Result]
    arguments: tuple[Any, ...]
    known: Result

    def turn(self, suite: Suite) -> tuple[bool, int]:
        """What comes first: a limit of time is to cut time against length and starts before shapes and layers, and of
        each of these peers that tune themselves for minutes, one family of shapes after the other, the main one first.
        """
        later = self.part in ("lengths", "cold_start")
        if self.known.get("implementation") != "fla":
            return later, 0
        families = [suite.sweep.name, *(shape.name for shape in suite.shapes)]
        return later, 1 + families.index(self.known["shape"]["name"])


def benchmark(
    options: Options,
    output: Path | None = None,
    say: Callable[[str], None] = print,
    worker: Worker | None = None,
) -> Result:
    """Measure, and return what `output` holds in the end.

    Args:
        options: what is measured.
        output: JSON file, written anew after each measurement.
        say: is called with one line a measurement.
        worker: where it is measured; by default a new process.

    Raises:
        UsageError: an option names what does not exist, or the device is not to be had.
        Failed: the device cannot even be described.
    """
    with worker or Worker() as worker:
        return _benchmark(options, output, say, worker)


def _benchmark(options: Options, output: Path | None, say: Callable[[str], None], worker: Worker) -> Result:
    started = time.monotonic()
    here = worker.call(measurements.describe, options.device, options.command, options.commit, limit=options.limit)
    name = "quick" if options.quick else "gpu" if here["device"].startswith("cuda") else "cpu"
    suite = SUITES[name]
    tasks = sorted(plan(suite, options, here), key=lambda task: task.turn(suite))
    result: Result = {
        "about": here["about"],
        "suite": name,
        "seconds": 0.0,
        "constant_tokens": suite.tokens,
        "ceilings": None,
        "shapes": [],
        "layer": [],
        "decoding": [],
        "lengths": [],
        "cold_start": [],
    }
    for number, task in enumerate(tasks, 1):
        elapsed = time.monotonic() - started
        left = float("inf") if options.minutes is None else 60 * options.minutes - elapsed
        record = task.known | _measured(task, worker, options.limit, left)
        _keep(result, task.part, record)
        say(f"[{number}/{len(tasks)}] {task.title}: {told(task.part, record)}")
        result["seconds"] = round(time.monotonic() - started, 1)
        if output is not None:
            write(result, output)
    return result


def plan(suite: Suite, options: Options, here: Result) -> Iterator[Task]:
    """All measurements, in order.

    Args:
        here: what `measurements.describe` found.

    Raises:
        UsageError: a shape or an implementation that does not exist.
    """
    _all_known("implementation", options.peers, here["implementations"])
    _all_known("shape", options.shapes, [*{s.name: 0 for s in suite.shapes}, *(s.label for s in suite.shapes)])
    device, parts = here["device"], options.only or PARTS
    how = (options.budget or suite.budget, options.repeats or suite.repeats)
    chosen = [s for s in suite.shapes if not options.shapes or {s.name, s.label} & set(options.shapes)]
    named = [n for name in suite.implementations for n in (here["backends"] if name == "backends" else [name])]

    if "ceilings" in parts:
        arguments = (device, suite.copy_bytes, suite.product_size, *how)
        yield Task("ceilings", "ceilings", measurements.measure_ceilings, arguments, {"problem": None})
    if "shapes" in parts:
        names = options.peers or tuple(dict.fromkeys(named))
        for shape in chosen:
            for name in _in_reach(names, shape, suite):
                if not options.peers and shape.name not in suite.families.get(name, shape.name):
                    continue
                beside_auto = "auto" in names and name in here["backends"]
                in_graph = name in IN_GRAPH and shape.tokens <= suite.graph_tokens
                yield _task(
                    "shapes", measurements.measure_shape, device, name, shape, *how, True, beside_auto, in_graph
                )
    if "layer" in parts:
        layers = [shape for shape in suite.layers if shape in chosen]
        asked = options.peers or suite.layer_implementations
        # Separate operations are another way to run our own layer, so they come with it.
        ways = [n for n in suite.layer_implementations if n in asked or (n == "separate" and "auto" in asked)]
        for shape, operation, name in measured_of_layers(layers, ways):
            yield _task("layer", measure_layer, device, name, shape, operation, *how, operation=operation)
    if "decoding" in parts:
        names = tuple(n for n in options.peers or suite.decoding_implementations if n in here["decoders"])
        for decoding in suite.decodings:
            for batch in decoding.batches:
                shape = replace(decoding.shape, B=batch, T=1)
                for name in ("copy", *(n for n in names if n != "fla" or decoding.state == "float32")):
                    rest = (decoding.state, *how, suite.rotated_bytes)
                    yield _task("decoding", measure_decoding, device, name, shape, *rest, state=decoding.state)
    if "lengths" in parts:
        for shape in suite.sweep_shapes():
            for name in _in_reach(options.peers or suite.sweep_implementations, shape, suite):
                in_graph = name == "auto" and shape.tokens <= suite.graph_tokens
                yield _task("lengths", measurements.measure_shape, device, name, shape, *how, False, False, in_graph)
    if "cold_start" in parts:
        for name in ("auto", "fla") if options.cold_fla else ("auto",):
            yield _task("cold_start", measure_cold_start, device, name, suite.cold_start)


def _task(
    part: str,
    function: Callable[..., Result],
    device: str,
    name: str,
    shape: Shape,
    *rest: Any,
    **more: str,
) -> Task:
    known = {"implementation": name, "shape": asdict(shape) | {"label": shape.label}, "problem": None} | more
    words = more.get("operation", part).replace("_", " "), shape.label, more.get("state"), name
    title = " ".join(word for word in words if word)
    return Task(part, title, function, (device, name, shape, *rest), known)


def _in_reach(names: tuple[str, ...], shape: Shape, suite: Suite) -> list[str]:
    return [name for name in names if shape.tokens <= suite.most_tokens.get(name, shape.tokens)]


def _measured(task: Task, worker: Worker, limit: float, left: float) -> Result:
    no_time = {"problem": "not run: no time left"}
    if left <= 0:
        return no_time
    try:
        if task.part == "cold_start":  # it starts a process of its own
            return task.function(*task.arguments, min(limit, left))
        return worker.call(task.function, *task.arguments, limit=min(limit, left))
    except TookTooLong as failure:
        return no_time if left < limit else {"problem": f"failed: {failure}"}
    except (Failed, UsageError) as failure:
        return {"problem": f"failed: {failure}"}


def _keep(result: Result, part: str, record: Result) -> None:
    """Add a record; times beside the least the device needs for the bytes."""
    if part == "ceilings":
        result[part] = record
        return
    result[part].append(record)
    ceilings = result["ceilings"] or {}
    for cost in (record.get(name) for name in ("forward", "forward_backward")):
        if cost and "least_bytes" in cost and "copy" in ceilings:
            cost["least_seconds"] = cost["least_bytes"] / ceilings["copy"]["bytes_per_second"]
            cost["times_the_least"] = cost["seconds"] / cost["least_seconds"]


def _all_known(what: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}; choose of {', '.join(known)}.{did_you_mean(name, known)}")
