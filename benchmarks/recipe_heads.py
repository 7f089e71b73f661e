"""What a shipped recipe is expected to take: the block in its head between `# <!-- expected -->` and `# <!-- end -->`.

Memory is the estimate of a dry run. Time is the model's FLOPs over what GPUs reach of their peak: the shares measured
by `python -m benchmarks.scaling` on one and on two (benchmarks/results/scaling.json), or while there are none the dry
run's.
"""

import json
import re
from pathlib import Path

from flash_gsa.errors import UsageError
from flash_gsa.training.dry_run import ASSUMED_SHARE, DryRun, dry_run, duration, peak_flops
from flash_gsa.training.estimate import GIB, Size, model_size
from flash_gsa.training.recipe import EngineSection, Recipe
from flash_gsa.training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = RESULTS / "scaling.json"
BLOCK = re.compile(r"(# <!-- expected -->\n).*?(# <!-- end -->)", re.DOTALL)
GPU, MEMORY = "H100", 0.9 * 79 * GIB
"""What PyTorch sees of an H100 with 80 GB, less what its allocator may lose between tensors."""
COUNTS = (1, 8, 32)


def recipes_with_heads() -> list[Path]:
    """The files that have a block."""
    return [path for path in sorted(RECIPES.glob("*.yaml")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def with_head(path: Path) -> str:
    """The file's text, its block made anew."""
    lines = "".join(f"# {line}".rstrip() + "\n" for line in _lines(path.stem))
    return BLOCK.sub(lambda m: f"{m[1]}{lines}{m[2]}", path.read_text(encoding="utf-8"))


def _lines(name: str) -> list[str]:
    one, several, origin = _shares()
    peak = peak_flops(GPU)
    assert peak is not None
    recipe = load_recipe(name, data_named=False)
    size = model_size(recipe)
    rows = []
    for count in (1,) if recipe.engine.kind == "single" else COUNTS:
        run, said = _fitting(recipe, count, size)
        time = duration(run.seconds((one if count == 1 else several) * peak) or 0)
        rows.append(f"  {count:>4}   {run.memory.total / GIB:>11.0f} GiB   {time:>9}   {said}".rstrip())
    return [*_sizes(run), f"  {GPU}s   memory of each        time", *rows, *origin, *_taken(name)]


def _taken(name: str) -> list[str]:
    """What a run of the recipe took whose result is kept."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    run = json.loads(path.read_text(encoding="utf-8"))
    memory = run["largest_memory_bytes"] / GIB
    return [f"  Measured: {run['seconds']:.0f} s and {memory:.1f} GiB of tensors on one {run['about']['device']}."]


def _sizes(run: DryRun) -> list[str]:
    size = run.size
    return [
        f"Expected:  {size.parameters / 1e6:,.1f} M parameters, {size.embeddings / 1e6:.1f} M of them in embedding and "
        f"output; {size.flops:.2g} FLOPs a token.",
        f"           {run.tokens:,} tokens in {run.steps:,} steps of {run.recipe.batch.tokens:,}, {run.warmup_steps:,} "
        "of them warm-up.",
    ]


def _fitting(recipe: Recipe, count: int, size: Size) -> tuple[DryRun, str]:
    """The run on so many GPUs, and what has to be set for it."""
    own = recipe.engine
    choices = [(own, ""), (own.model_copy(update={"checkpointing": "all"}), "engine.checkpointing=all")]
    if count == 1 and own.kind != "single":
        one, again = {"kind": "single"}, {"kind": "single", "checkpointing": "all"}
        choices = [(EngineSection(**one), _section(one)), (EngineSection(**again), _section(again))]
    for engine, said in choices:
        run = dry_run(recipe.model_copy(update={"engine": engine}), count, size)
        if run.memory.total <= MEMORY:
            return run, said
    raise UsageError(f"the recipe {recipe.name} fits {count} × {GPU} neither as it is nor with checkpointing")


def _section(values: dict[str, str]) -> str:
    return f"engine={{{', '.join(f'{name}: {value}' for name, value in values.items())}}}"


def _shares() -> tuple[float, float, list[str]]:
    """Of a GPU's peak, where it is alone and where it is not, and where that is from."""
    if MEASURED.exists():
        runs = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
        alone = max((r["mfu"] for r in runs if r.get("mfu") and r["processes"] == 1), default=None)
        beside = next((r["mfu"] for r in runs if r.get("mfu") and "reshard_after: step" in r["name"]), None)
        if alone and beside:
            return (
                alone,
                beside,
                [
                    f"  Time: at {alone:.0%} of the peak on one, {beside:.0%} on several: benchmarks.scaling, 1.3B,",
                    "  on one GPU and two of one machine; small models reach less. Memory: estimated.",
                ],
            )
    return (
        ASSUMED_SHARE,
        ASSUMED_SHARE,
        [
            f"  Time: at {ASSUMED_SHARE:.0%} of the peak, which is assumed and not measured; small models reach less.",
            "  Memory: estimated; `flash-gsa train … --dry-run` tells its parts.",
        ],
    )
