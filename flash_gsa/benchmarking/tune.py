"""Which tiles are fastest on this GPU: `flash-gsa bench tune`, which regenerates rows of `ops/triton/tiles.py`.

For every row the calls that it is for are taken, one kernel after the other is tried with tiles near those of the row
there is, and of every C and BT the fastest tiles together are timed as a whole beside that row.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flash_gsa.errors import UsageError, did_you_mean
from flash_gsa.ops.triton.tiles import KERNELS, Tile, Tiles

from .about import write
from .tune_candidates import Cut, Group, Workload, best, groups, row_text, sizes_of, stands_in_table
from .tune_kernels import NO_TIME, Machine

Result = dict[str, Any]
Say = Callable[[str], None]

ROUNDS = 2
SHOWN = 4
"""Candidates of a kernel that are printed; all are in the result."""


@dataclass(frozen=True)
class Options:
    """What is tuned, and for how long.

    Args:
        shapes: names of `WORKLOADS`; empty: all.
        kernels: some of `KERNELS`, at C and BT of the row there is; empty: all kernels, and others of these.
        budget: seconds for everything, shared among rows; None: no end.
        jobs: processes that compile; None: one a processor core.
        command, commit: what the result says of itself; the commit is for code outside a git checkout.

    Raises:
        UsageError: a kernel that does not exist, or a number that cannot be.
    """

    shapes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    budget: float | None = None
    jobs: int | None = None
    command: str = "flash_gsa.benchmarking.tune.tune"
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in self.kernels:
            if name not in KERNELS:
                hint = did_you_mean(name, KERNELS)
                raise UsageError(f"there is no kernel {name!r}; choose of {', '.join(KERNELS)}.{hint}")
        if self.budget is not None and not self.budget > 0:
            raise UsageError(f"budget is {self.budget:g}; expected seconds, a number above 0")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs is {self.jobs}; expected 1 or more")


@dataclass
class Candidate:
    """One tile of one kernel at one cut, (C, BT), on one workload: what became of it."""

    workload: Workload
    cut: Cut
    kernel: str
    tile: Tile
    record: Result
    seconds: list[float]

    @property
    def runs(self) -> bool:
        return self.record["problem"] is None

    def among(self, tiles: Tiles) -> Tiles:
        """`tiles` with its own tile and cut in place of theirs."""
        mine: dict[str, Any] = _sizes_of_cut(self.cut) | {self.kernel: self.tile}
        return replace(tiles, **mine)


def tune(options: Options, output: Path | None = None, say: Say = print, machine: Machine | None = None) -> Result:
    """Tune, and return what `output` holds in the end.

    Args:
        options: what is tuned.
        output: JSON file, written anew after each row.
        say: is called with everything there is to tell.
        machine: where it is measured; by default this one.

    Raises:
        UsageError: a shape does not exist, or there is no CUDA device here.
        Failed: the device cannot even be described.
    """
    started = time.monotonic()
    end = started + (options.budget or float("inf"))
    groups(options.shapes, (0, 0))  # a wrong name is told before anything is started
    with machine or Machine(options.jobs) as machine:
        here = machine.describe(options.command, options.commit)
        architecture = tuple(here["architecture"])
        told = f"capability {architecture[0]}.{architecture[1]}, {here['shared_bytes']:,} B of shared memory"
        say(f"{here['about']['device']}: {told}; compiling in {machine.jobs} processes")
        result: Result = {"about": here["about"], "architecture": architecture, "shared_bytes": here["shared_bytes"]}
        result |= {"seconds": 0.0, "groups": []}
        todo = groups(options.shapes, architecture)
        for i, group in enumerate(todo):
            now = time.monotonic()
            found = _Search(group, options, here, machine, say).run(now + (end - now) / (len(todo) - i))
            result["groups"].append(found)
            result["seconds"] = round(time.monotonic() - started, 1)
            if output is not None:
                write(result, output)
    rows = [found["row"] for found in result["groups"] if found["row"]]
    if rows:
        say("\nPaste into TABLE of flash_gsa/ops/triton/tiles.py, before the rows of ANY:")
        say("\n".join(rows))
    return result


class _Search:
    """The search for one row."""

    def __init__(self, group: Group, options: Options, here: Result, machine: Machine, say: Say):
        self.group, self.here, self.machine, self.say = group, here, machine, say
        self.architecture = tuple(here["architecture"])
        self.kernels = [kernel for kernel in KERNELS if not options.kernels or kernel in options.kernels]
        self.chunks = group.chunks[:1] if options.kernels else group.chunks
        self.candidates: list[Candidate] = []
        self.left_out = 0

    def run(self, end: float) -> Result:
        """Compile, time each kernel, time the best of them together; what there is when `end` comes decides."""
        labels = ", ".join(workload.label for workload in self.group.workloads)
        self.say(f"\n{labels}: C {', '.join(map(_cut_text, self.chunks))}")
        self._compile(_share(end, 0.5))
        for turn in range(ROUNDS):
            self._time(turn, _share(end, 0.45))
        for workload in self.group.workloads:
            for cut in self.chunks:
                self._tell(workload, cut)
        whole = self._time_whole(self._contenders(), end)
        return self._decision(whole)

    def _compile(self, until: float) -> None:
        """Candidates of all kernels and cuts by turns, so that when time runs out the likeliest of each are there."""
        ranked: list[tuple[int, Candidate]] = []
        for turn, cut in enumerate(self.chunks, 1):
            for kernel in KERNELS:
                tiles, left_out = self.group.candidates(kernel, cut, self.here["shared_bytes"])
                if kernel in self.kernels:
                    self.left_out += left_out
                else:  # launched all the same, since every call launches all
                    tiles = tiles[:1]
                for rank, tile in enumerate(tiles):
                    for workload in self.group.workloads:
                        # Of another cut only the likelier tiles, while time is short.
                        ranked.append((rank * turn, Candidate(workload, cut, kernel, tile, {}, [])))
        self.candidates = [candidate for _, candidate in sorted(ranked, key=lambda pair: pair[0])]
        start = time.monotonic()
        before = self.group.before.tiles
        tasks = [(self.here["target"], c.workload, c.among(before), c.kernel) for c in self.candidates]
        for candidate, record in zip(self.candidates, self.machine.compile(tasks, until), strict=True):
            candidate.record = record
            limit = self.here["shared_bytes"]
            if candidate.runs and record["shared_bytes"] > limit:
                candidate.record |= {"problem": f"out of shared memory: {record['shared_bytes']:,} of {limit:,} B"}
        missing = sum(c.record["problem"] == NO_TIME for c in self.candidates)
        self.say(
            f"  {len(tasks)} candidates, {missing} not compiled in time, {self.left_out} left out as too large; "
            f"{time.monotonic() - start:.0f} s"
        )

    def _base(self, workload: Workload, cut: Cut) -> Tiles | None:
        """Of each kernel the first candidate that runs: what stands beside a candidate of another kernel."""
        chosen: dict[str, Any] = _sizes_of_cut(cut)
        for kernel in KERNELS:
            chosen[kernel] = next((c.tile for c in self._of(workload, cut, kernel) if c.runs), None)
        return None if None in chosen.values() else replace(self.group.before.tiles, **chosen)

    def _of(self, workload: Workload, cut: Cut, kernel: str) -> list[Candidate]:
        return [c for c in self.candidates if (c.workload, c.cut, c.kernel) == (workload, cut, kernel)]

    def _time(self, turn: int, until: float) -> None:
        """One round over all candidates; after the first, the fastest come first."""
        order = [c for c in self.candidates if c.runs and c.kernel in self.kernels and len(c.seconds) == turn]
        if turn:
            order.sort(key=self._lag)
        bases = {(w, cut): self._base(w, cut) for w in self.group.workloads for cut in self.chunks}
        for candidate in order:
            base = bases[candidate.workload, candidate.cut]
            reference = next((b for (w, _), b in bases.items() if w == candidate.workload and b), None)
            if base is None or reference is None:
                with_it = f"C {_cut_text(candidate.cut)}"
                candidate.record |= {"problem": f"another kernel has no tile that runs with {with_it}"}
                continue
            task = (candidate.workload, candidate.among(base), candidate.kernel, reference)
            record = self.machine.time_kernel(*task, until=until)
            seconds = record.pop("seconds", None)
            if record["problem"] == NO_TIME:
                continue
            candidate.record |= record
            if seconds is not None:
                candidate.seconds.append(seconds)

    def _lag(self, candidate: Candidate) -> float:
        """How many times longer than the fastest of its kind it took in the first round; 0 for a tile of the row."""
        if candidate.tile == getattr(self.group.before.tiles, candidate.kernel):
            return 0.0
        kind = self._of(candidate.workload, candidate.cut, candidate.kernel)
        return candidate.seconds[0] / min(c.seconds[0] for c in kind if c.seconds)

    def _contenders(self) -> list[Tiles]:
        """The tiles there are, then of every cut the fastest of each kernel."""
        before = self.group.before.tiles
        found = [before]
        for cut in self.chunks:
            chosen: dict[str, Any] = _sizes_of_cut(cut)
            for kernel in self.kernels:
                measured: dict[Tile, dict[str, Sequence[float]]] = {}
                for c in self.candidates:
                    if (c.cut, c.kernel) == (cut, kernel) and c.runs:
                        measured.setdefault(c.tile, {})[c.workload.name] = c.seconds
                chosen[kernel] = best(measured, getattr(before, kernel))
            if None not in chosen.values():
                found.append(replace(before, **chosen))
        return list(dict.fromkeys(found))

    def _time_whole(self, contenders: list[Tiles], until: float) -> list[Result]:
        """Forward and backward under each of them, twice by turns."""
        records: list[Result] = []
        for workload in self.group.workloads:
            mine: list[Result] = [
                {"workload": workload.name, "tiles": tiles, "problem": None, "forward": [], "forward_backward": []}
                for tiles in contenders
            ]
            for _ in range(ROUNDS):
                for record in mine:
                    new = self.machine.time_whole(workload, record["tiles"], until=until)
                    record["problem"] = record["problem"] or new["problem"]
                    if new["problem"] is None:
                        record["peak_bytes"] = new["peak_bytes"]
                        for name in ("forward", "forward_backward"):
                            record[name].append(new[name])
            records += mine
        return records

    def _decision(self, whole: list[Result]) -> Result:
        before = self.group.before.tiles
        measured: dict[Tiles, dict[str, Sequence[float]]] = {}
        for record in whole:
            measured.setdefault(record["tiles"], {})[record["workload"]] = record["forward_backward"]
            self.say(f"  {record['workload']}: {_whole_line(record)}")
        chosen = best(measured, before)
        row = None
        if chosen is None or chosen == before:
            self.say(f"  the row there is stays: {_sizes(before)}")
        if chosen is not None and (chosen != before or not stands_in_table(self.architecture, self.group.before)):
            reason = self._reason(chosen, before, measured)
            row = row_text(self.architecture, self.group.model, chosen, reason)
        return {
            "workloads": [
                asdict(workload.shape)
                | {"workload": workload.name, "dtype": workload.precision, "linear": workload.linear}
                for workload in self.group.workloads
            ],
            "candidates": [
                {"workload": c.workload.name, **_sizes_of_cut(c.cut), "kernel": c.kernel, "tile": sizes_of(c.tile)}
                | c.record
                | {"seconds": c.seconds}
                for c in self.candidates
            ],
            "left_out": self.left_out,
            "whole": [record | {"tiles": asdict(record["tiles"])} for record in whole],
            "before": asdict(before),
            "chosen": None if chosen is None else asdict(chosen),
            "row": row,
        }

    def _reason(self, chosen: Tiles, before: Tiles, measured: dict[Tiles, dict[str, Sequence[float]]]) -> str:
        parts = []
        for workload in self.group.workloads:
            new, old = (measured.get(tiles, {}).get(workload.name) for tiles in (chosen, before))
            if new:
                instead = f", before {1e6 * sum(old) / len(old):.0f}" if old and chosen != before else ""
                parts.append(f"{workload.name} {1e6 * sum(new) / len(new):.0f} µs{instead}")
        return f"forward and backward on {self.here['about']['device']}: {'; '.join(parts)}"

    def _tell(self, workload: Workload, cut: Cut) -> None:
        for kernel in self.kernels:
            found = self._of(workload, cut, kernel)
            timed = sorted((c for c in found if c.seconds and c.runs), key=lambda c: min(c.seconds))
            before = self.group.before.tiles
            mine = getattr(before, kernel) if cut == (before.C, before.BT) else None
            if found:
                self.say(f"  {workload.name}, C {_cut_text(cut)}, {kernel}")
            for c in timed[:SHOWN] + [c for c in timed[SHOWN:] if c.tile == mine]:
                self.say(f"    {_line(c)}{'   the row there is' if c.tile == mine else ''}")
            failed: dict[str, list[str]] = {}
            for c in found:
                if c.record["problem"] not in (None, NO_TIME):
                    failed.setdefault(c.record["problem"], []).append(str(sizes_of(c.tile)))
            for problem, tiles in failed.items():
                self.say(f"    failed: {' '.join(tiles)}: {problem}")


def _sizes_of_cut(cut: Cut) -> dict[str, Any]:
    return dict(zip(("C", "BT"), cut, strict=True))


def _cut_text(cut: Cut) -> str:
    """C, and BT where it is another."""
    return str(cut[0]) if cut[0] == cut[1] else f"{cut[0]} by {cut[1]}"


def _share(end: float, part: float) -> float:
    """When `part` of the time until `end` is over."""
    now = time.monotonic()
    return now + (end - now) * part


def _line(c: Candidate) -> str:
    low, high = 1e6 * min(c.seconds), 1e6 * max(c.seconds)
    spread = f"{low:.1f} to {high:.1f}" if len(c.seconds) > 1 else f"{low:.1f}, once"
    taken = c.record
    return (
        f"{spread} µs   {sizes_of(c.tile)}   {taken['registers']} registers, {taken['spills']} spilled, "
        f"{taken['shared_bytes']:,} B shared"
    )


def _whole_line(record: Result) -> str:
    times = {name: record[name] for name in ("forward", "forward_backward")}
    if record["problem"] or not all(times.values()):
        return f"{record['problem']}   {_sizes(record['tiles'])}"
    forward, both = ([f"{1e6 * x:.0f}" for x in times[name]] for name in ("forward", "forward_backward"))
    memory = record["peak_bytes"] / 2**20
    told = f"forward {' and '.join(forward)} µs, with backward {' and '.join(both)} µs, {memory:,.0f} MiB"
    return f"{told}   {_sizes(record['tiles'])}"


def _sizes(tiles: Tiles) -> str:
    return f"C {_cut_text((tiles.C, tiles.BT))} {' '.join(str(sizes_of(getattr(tiles, kernel))) for kernel in KERNELS)}"
