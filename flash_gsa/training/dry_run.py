"""What a run comes to before it starts: sizes, work, memory, time; and the smallest change that makes it fit."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from flash_gsa.errors import UsageError
from flash_gsa.training.engine import PEAK_FLOPS
from flash_gsa.training.estimate import GIB, Memory, Size, estimate_memory, model_size
from flash_gsa.training.recipe import Recipe
from flash_gsa.training.schedule import RunLength

ASSUMED_SHARE = 0.4
"""Of a GPU's peak, in model FLOPs: a round number for any model. Heads of recipes have what was measured."""
MOST_PROCESSES = 4096


@dataclass(frozen=True)
class DryRun:
    """A run by the numbers.

    Attributes:
        recipe, processes: what it is of.
        size: the model's.
        memory: of each process.
        micro_rows, micro_batches: what a process computes at once, and how often in a step.
        steps: of the run; None where the time decides. warmup_steps: of them.
    """

    recipe: Recipe
    processes: int
    size: Size
    memory: Memory
    micro_rows: int
    micro_batches: int
    steps: int | None
    warmup_steps: int

    @property
    def tokens(self) -> int | None:
        """Tokens of the run."""
        return None if self.steps is None else self.steps * self.recipe.batch.tokens

    @property
    def flops(self) -> float | None:
        """FLOPs of the run, as the model is defined: see `flash_gsa.models.flops`."""
        return None if self.tokens is None else self.tokens * self.size.flops

    def seconds(self, flops_per_second: float) -> float | None:
        """Time of the run's steps, if each process does so many FLOPs a second, those of forwards computed again with
        checkpointing among them."""
        if self.flops is None:
            return None
        which = self.recipe.engine.checkpointing
        again = {"none": 0.0, "all": 1.0}[which] if isinstance(which, str) else 1 / which
        return self.flops * (1 + again / 3) / (flops_per_second * self.processes)


def dry_run(recipe: Recipe, processes: int = 1, size: Size | None = None) -> DryRun:
    """Works a run out; reads no data, needs no GPU and hardly any memory.

    Args:
        recipe: of the run.
        processes: how many train together.
        size: of the recipe's model, where it is known already.

    Raises:
        UsageError: the tokenizer cannot be used, or the recipe cannot run on so many processes.
    """
    size = size or model_size(recipe)
    memory = estimate_memory(recipe, processes, size)
    length = RunLength(recipe.schedule, recipe.batch)
    rows, count = recipe.batch.micro_batches(processes, recipe.engine.context)
    return DryRun(recipe, processes, size, memory, rows, count, length.total_steps, length.warmup_steps)


def check_fits(recipe: Recipe, processes: int, device_memory: int, size: Size | None = None) -> None:
    """Refuses a run that takes more than a device has.

    Args:
        recipe: of the run.
        processes: how many train together.
        device_memory: bytes of one device.
        size: of the recipe's model, where it is known already.

    Raises:
        UsageError: it does not fit; the message names the smallest change that does.
    """
    size = size or model_size(recipe)
    needed = estimate_memory(recipe, processes, size).total
    if needed <= device_memory:
        return
    said = (
        f"The run needs about {needed / GIB:.1f} GiB on each of {processes} device{'s'[: processes - 1]}, which "
        f"ha{'s' if processes == 1 else 've'} {device_memory / GIB:.1f} GiB. "
    )

    def fits(change: _Change) -> bool:
        return estimate_memory(change.recipe, change.processes, size).total <= device_memory

    for ladder in _ladders(recipe, processes):
        first = bisect_left(ladder, True, key=fits)
        if first < len(ladder):
            change = ladder[first]
            then = estimate_memory(change.recipe, change.processes, size).total
            raise UsageError(f"{said}The smallest change that fits: {change.said} ({then / GIB:.1f} GiB)")
    raise UsageError(
        f"{said}Nothing fits: not one row at a time, not with engine.checkpointing=all, not in shards over as many "
        "processes as there are rows. Take a smaller model, shorter rows, or a device with more memory"
    )


@dataclass(frozen=True)
class _Change:
    """What to say, and what it comes to."""

    said: str
    recipe: Recipe
    processes: int


def _ladders(recipe: Recipe, processes: int) -> Iterator[list[_Change]]:
    """Changes, the smaller ones first; within a ladder each takes less memory than the one before.

    Rows cut into micro-batches are a ladder of their own: DDP keeps gradients for several that it does not for one.
    """
    also = ""
    if recipe.engine.reshard_after == "step":  # with it, fewer rows at once can take more: sums of micro-batches
        also, recipe = "engine.reshard_after=block ", _with_engine(recipe, reshard_after="block")
        yield [_Change(also.strip(), recipe, processes)]
    yield _fewer_rows(recipe, processes, also)
    again = _with_engine(recipe, checkpointing="all")
    if recipe.engine.checkpointing != "all":
        said = f"{also}engine.checkpointing=all"
        yield from ([_Change(said, again, processes)], _fewer_rows(again, processes, said))
    sharded = recipe.engine.kind in ("fsdp2", "zero3")
    if not sharded and processes > 1:
        for base, more in ((recipe, ""), (again, " engine.checkpointing=all")):
            said, changed = f"{also}engine.kind=fsdp2{more}", _with_engine(base, kind="fsdp2", replicas=None)
            yield from ([_Change(said, changed, processes)], _fewer_rows(changed, processes, said))
    # More processes divide what is kept. What one of them computes at once is the least there is.
    settings, least = f"{also}engine.checkpointing=all batch.micro_rows=1", _with_rows(again, 1)
    if not sharded:
        settings, least = f"engine.kind=fsdp2 {settings}", _with_engine(least, kind="fsdp2", replicas=None)
    counts = [processes << n for n in range(1, MOST_PROCESSES.bit_length()) if processes << n <= MOST_PROCESSES]
    usable = [n for n in counts if recipe.batch.rows * recipe.engine.context % n == 0]
    yield [_Change(f"{n} processes with {settings}", least, n) for n in usable]


def _fewer_rows(recipe: Recipe, processes: int, also: str = "") -> list[_Change]:
    """Ever fewer rows at once, with `also` said before."""
    rows, count = recipe.batch.micro_batches(processes, recipe.engine.context)
    divisors = [n for n in range(rows - 1, 0, -1) if rows * count % n == 0]
    return [_Change(f"{also.strip()} batch.micro_rows={n}".strip(), _with_rows(recipe, n), processes) for n in divisors]


def _with_engine(recipe: Recipe, **values: object) -> Recipe:
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=values)})


def _with_rows(recipe: Recipe, micro_rows: int) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_rows": micro_rows})})


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS if part in device), None)


def duration(seconds: float) -> str:
    """For people: `35 s`, `12.3 min`, `5.2 h`, `3.1 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
