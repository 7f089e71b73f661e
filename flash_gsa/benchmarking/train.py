"""The benchmark of training as a whole: which models, in which order, and the result they add up to."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flash_gsa.errors import UsageError

from . import measurements
from .about import about, write
from .cold_start import CACHES
from .train_gate import measure_errors
from .train_models import DEFAULT_VARIANTS, SIZES, TRAINED, all_variants, check_known
from .train_profile import measure_profile
from .train_report import told
from .train_steps import PRECISIONS, Job, measure_first_step, measure_steps
from .worker import Failed, TookTooLong, Worker

PARTS = ("ceilings", "steps", "profile", "cold_start")

Result = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """What is measured unless it is chosen: a model's size, tokens a step, lengths of its sequences, steps that are
    timed, precision; and how large and how long the device's own copy and product are."""

    size: str
    tokens: int
    lengths: tuple[int, ...]
    steps: int
    precision: str
    copy_bytes: int
    product_size: int
    budget: float


SUITES = {
    "gpu": Suite("1.3B", 16384, (2048, 4096, 8192, 16384), 10, "pure_bf16", 2**31, 8192, 0.5),
    "quick": Suite("tiny", 64, (32, 64), 3, "fp32", 2**20, 128, 0.01),
}


@dataclass(frozen=True)
class Options:
    """What is measured, and how thoroughly; what is None or empty is that of the device's suite.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        quick: a tiny model, as on a CPU, to see that all of it works.
        size: of SIZES. tokens: a step. lengths: of the sequences these are cut into.
        peers: of TRAINED. variants: ways to run them; those that one of them does not have are left out for it.
        precision: of PRECISIONS.
        steps: how many are timed.
        only: some of PARTS; empty: all.
        profile: whether to look into the kernels of our steps, at the first of the lengths.
        limit: seconds after which one measurement is given up.
        minutes: after which no further measurement begins; None: no end.
        command, commit: what the result says of itself; the commit is for code outside a git checkout.

    Raises:
        UsageError: a name that does not exist, or numbers that do not fit.
    """

    device: str = "auto"
    quick: bool = False
    size: str | None = None
    tokens: int | None = None
    lengths: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    precision: str | None = None
    steps: int | None = None
    only: tuple[str, ...] = ()
    profile: bool = False
    limit: float = 900.0
    minutes: float | None = None
    command: str = "flash_gsa.benchmarking.train.benchmark"
    commit: str | None = None

    def __post_init__(self) -> None:
        for what, given, known in (
            ("size", (self.size,), SIZES),
            ("model", self.peers, TRAINED),
            ("variant", self.variants, all_variants()),
            ("precision", (self.precision,), PRECISIONS),
            ("part", self.only, PARTS),
        ):
            check_known(what, tuple(name for name in given if name is not None), known)
        for name, value in (("limit", self.limit), ("minutes", self.minutes)):
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}; expected a number above 0")
        for name, value in (("tokens", self.tokens), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected 1 or more")
        names = self.peers or tuple(TRAINED)
        if not any(set(TRAINED[name].variants) & set(self.variants) for name in names):
            there = ", ".join(dict.fromkeys(v for name in names for v in TRAINED[name].variants))
            raise UsageError(f"none of {', '.join(names)} has a variant {', '.join(self.variants)}; they have {there}")
        if self.only and self.profile != ("profile" in self.only):
            raise UsageError("a profile is asked for and is not among the parts, or the other way round; give both")


@dataclass(frozen=True)
class Task:
    """One measurement: `function(*arguments)` makes a record of `part`, of which `known` is known before."""

    part: str
    title: str
    function: Callable[..., Result]
    arguments: tuple[Any, ...]
    known: Result


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
        UsageError: numbers that do not fit, or a device that is not to be had.
        Failed: the device cannot even be described.
    """
    with worker or Worker() as worker:
        return _benchmark(options, output, say, worker)


def _benchmark(options: Options, output: Path | None, say: Callable[[str], None], worker: Worker) -> Result:
    started = time.monotonic()
    here = worker.call(describe, options.device, options.command, options.commit, limit=options.limit)
    name = "quick" if options.quick else "gpu" if here["device"].startswith("cuda") else "cpu"
    suite = SUITES["quick" if name == "cpu" else name]
    precision = options.precision or suite.precision
    size, tokens = options.size or suite.size, options.tokens or suite.tokens
    tasks = list(plan(suite, options, here["device"]))
    result: Result = {
        "about": here["about"],
        "suite": name,
        "size": asdict(SIZES[size]),
        "precision": precision,
        "tokens": tokens,
        "peak_flops": None if precision == "fp32" else here["peak_flops"],
        "seconds": 0.0,
        "ceilings": None,
        **{part: [] for part in ("gates", "steps", "profile", "cold_start")},
    }
    for number, task in enumerate(tasks, 1):
        elapsed = time.monotonic() - started
        left = float("inf") if options.minutes is None else 60 * options.minutes - elapsed
        refused = _refused(task, result["gates"])
        record = task.known | (refused or _measured(task, worker, options.limit, left))
        _keep(result, task.part, record)
        say(f"[{number}/{len(tasks)}] {task.title}: {told(task.part, record)}")
        result["seconds"] = round(time.monotonic() - started, 1)
        if output is not None:
            write(result, output)
    return result


def describe(device: str, command: str, commit: str | None) -> Result:
    """{"about", "device", "peak_flops": what the device can do at best in bfloat16, None where that is not known}."""
    import torch

    from flash_gsa.training.engine import PEAK_FLOPS

    place = measurements.open_device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else ""
    peak = next((peak for part, peak in PEAK_FLOPS if part in name), None)
    return {"about": about(command, str(place), commit), "device": str(place), "peak_flops": peak}


def plan(suite: Suite, options: Options, device: str) -> Iterator[Task]:
    """All measurements, in order: values before speed, and what tunes itself for minutes last.

    Raises:
        UsageError: a length that does not divide the tokens of a step.
    """
    tokens, parts = options.tokens or suite.tokens, options.only or PARTS
    lengths = options.lengths or suite.lengths
    for length in lengths:
        if length < 2 or tokens % length:
            raise UsageError(
                f"sequences of {length} tokens do not make up the {tokens} tokens of a step; choose lengths (of 2 or "
                "more) that divide --tokens"
            )
    if "ceilings" in parts:
        arguments = (device, suite.copy_bytes, suite.product_size, suite.budget, 3)
        yield Task("ceilings", "ceilings", measurements.measure_ceilings, arguments, {"problem": None})
    for name, who in TRAINED.items():
        if options.peers and name not in options.peers:
            continue
        jobs = [
            Job(name, variant, options.size or suite.size, tokens // T, T, options.precision or suite.precision)
            for variant in who.variants
            if variant in options.variants
            for T in lengths
        ]
        firsts = [job for job in jobs if job.length == lengths[0]]
        judged = "steps" in parts or (name == "ours" and {"profile", "cold_start"} & set(parts))
        yield from (_task("gates", job, measure_errors, device, job) for job in firsts if judged)
        if "steps" in parts:
            yield from (_task("steps", job, measure_steps, device, job, options.steps or suite.steps) for job in jobs)
        own = [job for job in firsts if name == "ours" and job.variant != "graph"]
        if "profile" in parts and options.profile:
            yield from (_task("profile", job, measure_profile, device, job) for job in own)
        if "cold_start" in parts:
            yield from (_task("cold_start", job, measure_cold_start, device, job) for job in own)


def _task(part: str, job: Job, function: Callable[..., Result], *arguments: Any) -> Task:
    known = {key: value for key, value in asdict(job).items() if key not in ("size", "precision")}
    return Task(part, f"{part.replace('_', ' ')} {job.label}", function, arguments, known | {"problem": None})


def measure_cold_start(device: str, job: Job, limit: float) -> Result:
    """The first step in a new process with empty caches of compiled code, then in another with what that left.

    Raises:
        TookTooLong: a process took longer than `limit` seconds.
        Failed: it failed.
    """
    with TemporaryDirectory() as folder, _environment({name: os.path.join(folder, name.lower()) for name in CACHES}):
        records = []
        for _ in range(2):
            with Worker() as fresh:
                records.append(fresh.call(measure_first_step, device, job, limit=limit))
    return {"first": records[0], "second": records[1]}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _refused(task: Task, gates: list[Result]) -> Result | None:
    """Why there is nothing to time: the values are wrong, or were not compared."""
    if task.part in ("ceilings", "gates"):
        return None
    who = ("implementation", "variant")
    found = next((g for g in gates if all(g[key] == task.known[key] for key in who)), None)
    if found is None or found["problem"] is None:
        return None
    return {"problem": found["problem"]}


def _measured(task: Task, worker: Worker, limit: float, left: float) -> Result:
    no_time = {"problem": "not run: no time left"}
    if left <= 0:
        return no_time
    try:
        if task.part == "cold_start":  # it starts processes of its own
            return task.function(*task.arguments, min(limit, left))
        return worker.call(task.function, *task.arguments, limit=min(limit, left))
    except TookTooLong as failure:
        return no_time if left < limit else {"problem": f"failed: {failure}"}
    except (Failed, UsageError) as failure:
        return {"problem": f"failed: {failure}"}


def _keep(result: Result, part: str, record: Result) -> None:
    """Add a record; its FLOP/s as a share of what the device can: by its data sheet (MFU), and in a product here."""
    if part == "ceilings":
        result[part] = record
        return
    result[part].append(record)
    if "flops_per_second" not in record:
        return
    if result["peak_flops"]:
        record["mfu"] = record["flops_per_second"] / result["peak_flops"]
    if product := (result["ceilings"] or {}).get("product"):
        record["share_of_product"] = record["flops_per_second"] / product["flops_per_second"]
