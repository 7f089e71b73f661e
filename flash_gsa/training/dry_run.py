"""What a run comes to before it starts: sizes, work, memory, time; and the smallest change that makes it fit."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from flash_gsa.errors import UsageError
from flash_gsa.training.engine import PEAK_FLOPS
from flash_gsa.training.estimate import GIB, Memory, Size, check_processes, estimate_memory, model_size
from flash_gsa.training.model import check_model
from flash_gsa.training.recipe import EngineSection, Recipe
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

    def total(change: _Change) -> int:
        return estimate_memory(change.recipe, change.processes, size).total

    def smallest(ladder: list[_Change]) -> _Change | None:
        first = bisect_left(ladder, True, key=lambda change: total(change) <= device_memory)
        return ladder[first] if first < len(ladder) else None

    cut = ""
    for ladder, beside in _ladders(recipe, processes):
        if change := smallest(ladder):
            said += f"The smallest change that fits: {change.said} ({total(change) / GIB:.1f} GiB)"
            if other := smallest(beside):
                over = other.recipe.engine.context
                said += f". Or, with each row cut over {over} processes: {other.said} ({total(other) / GIB:.1f} GiB)"
            raise UsageError(said)
        if any(change.recipe.engine.context > recipe.engine.context for change in ladder):
            cut = ", not with each row cut over them (engine.context)"
    raise UsageError(
        f"{said}Nothing fits: not one row at a time, not with engine.checkpointing=all, not in shards over as many "
        f"processes as there are rows{cut}. Take a smaller model, shorter rows, or a device with more memory"
    )


@dataclass(frozen=True)
class _Change:
    """What to say, and what it comes to."""

    said: str
    recipe: Recipe
    processes: int


def _ladders(recipe: Recipe, processes: int) -> Iterator[tuple[list[_Change], list[_Change]]]:
    """Changes, the smaller ones first; within a ladder each takes less memory than the one before.

    Rows cut into micro-batches are a ladder of their own: DDP keeps gradients for several that it does not for one.
    With a ladder of another engine comes one that keeps it and cuts rows over processes, to name beside: each costs
    time of another kind.
    """
    also = ""
    if recipe.engine.reshard_after == "step":  # with it, fewer rows at once can take more: sums of micro-batches
        also, recipe = "engine.reshard_after=block ", _with_engine(recipe, reshard_after="block")
        yield [_Change(also.strip(), recipe, processes)], []
    yield _fewer_rows(recipe, processes, also), []

    bases = [(also, recipe)]
    if recipe.engine.checkpointing != "all":
        bases.append((f"{also}engine.checkpointing=all ", _with_engine(recipe, checkpointing="all")))
    unsharded = recipe.engine.kind not in ("fsdp2", "zero3")
    fsdp2 = "engine.kind=fsdp2 " + ("engine.replicas=null " if recipe.engine.replicas else "")
    in_shards = [(fsdp2 + said, _with_engine(base, kind="fsdp2", replicas=None)) for said, base in bases]
    beside = _cut_rows(recipe, processes, also)
    for said, base in [*bases[1:], *(in_shards if unsharded and processes > 1 else [])]:
        yield [_Change(said.strip(), base, processes)], beside
        yield _fewer_rows(base, processes, said), beside
    cut_bases = bases if recipe.engine.kind == "fsdp2" else [*bases, *in_shards]  # zero3 cuts no rows
    for said, base in cut_bases:
        yield _cut_rows(base, processes, said), []

    # More processes divide what is kept. What one of them computes at once is the least there is: one row, then a part.
    counts = [processes << n for n in range(1, MOST_PROCESSES.bit_length()) if processes << n <= MOST_PROCESSES]
    said, least = (in_shards if unsharded else bases)[-1]
    if recipe.engine.checkpointing == "all":
        said += "engine.checkpointing=all "
    least = _with_rows(least, 1)
    more = [_Change(f"{n} processes with {said}batch.micro_rows=1", least, n) for n in counts]
    yield [change for change in more if _accepted(change)], []
    said, least = cut_bases[-1]
    yield [change for n in counts for change in _cut_rows(least, n, f"{n} processes with {said}")[-1:]], []


def _fewer_rows(recipe: Recipe, processes: int, also: str) -> list[_Change]:
    """Ever fewer rows at once, with `also` said before."""
    rows, count = recipe.batch.micro_batches(processes, recipe.engine.context)
    divisors = [n for n in range(rows - 1, 0, -1) if rows * count % n == 0]
    fewer = [_Change(f"{also}batch.micro_rows={n}", _with_rows(recipe, n), processes) for n in divisors]
    return [change for change in fewer if _accepted(change)]


def _cut_rows(recipe: Recipe, processes: int, also: str) -> list[_Change]:
    """One row at once, cut over ever more processes, with `also` said before; the rows of a step stay as many."""
    try:
        check_model(_with_engine(recipe, context=processes))
    except UsageError:  # softmax attention
        return []
    also += "" if recipe.batch.micro_rows == 1 else "batch.micro_rows=1 "
    one = _with_rows(recipe, 1)
    counts = [n for n in range(recipe.engine.context + 1, processes + 1) if processes % n == 0]
    cut = [_Change(f"{also}engine.context={n}", _with_engine(one, context=n), processes) for n in counts]
    return [change for change in cut if _accepted(change)]


def _accepted(change: _Change) -> bool:
    """Whether the rules of recipes allow it, which copies of a recipe have not been asked for."""
    try:
        EngineSection.model_validate(change.recipe.engine.model_dump())
        check_processes(change.recipe, change.processes)
    except (ValidationError, UsageError):
        return False
    return True


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
