"""What a shipped recipe is expected to take: the block in its head between `# <!-- expected -->` and `# <!-- end -->`.

Memory is the estimate of a dry run. Time is the model's FLOPs over what a GPU reaches of its peak: alone, as measured
of a model of that size or the nearest (SIZES); beside others, that times what two reached of one
(`python -m benchmarks.scaling`).
"""

import json
import re
from pathlib import Path
from typing import Any

from flash_gsa.errors import UsageError
from flash_gsa.training.dry_run import DryRun, dry_run, duration, peak_flops
from flash_gsa.training.estimate import GIB, Size, model_size
from flash_gsa.training.recipe import EngineSection, Recipe
from flash_gsa.training.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "benchmarks" / "results"
SIZES = {
    "gsa_340m": "train_gpu_340m",
    "gsa_1.3b": "train_gpu_bf16",
    "gsa_2.7b": "train_gpu_bf16",
    "prose_100m": "train_gpu_130m",
}
"""Recipe → the result of `flash-gsa bench train` on GPU for a model of its size, or the nearest."""
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
    one, several, origin, of_several = _shares(name)
    peak = peak_flops(GPU)
    assert peak is not None
    recipe = load_recipe(name, data_named=False)
    size = model_size(recipe)
    rows = []
    for count in (1,) if recipe.engine.kind == "single" else COUNTS:
        run, said = _fitting(recipe, count, size)
        share = one if count == 1 else several[run.micro_batches > 1]
        time = duration(run.seconds(share * peak) or 0)
        rows.append(f"  {count:>4}   {run.memory.total / GIB:>11.0f} GiB   {time:>9}   {said}".rstrip())
    if recipe.engine.kind != "single":
        origin += of_several
    return [*_sizes(run), f"  {GPU}s   memory of each        time", *rows, *origin, *_prepared(recipe), *_taken(name)]


def _prepared(recipe: Recipe) -> list[str]:
    """What its text takes of processors and disks before the first step, where the recipe says how much text."""
    text = getattr(recipe.data, "max_bytes", None)
    if text is None or not (RESULTS / "tokenising.json").exists():
        return []
    run = _result("tokenising")
    stored = text * run["store_bytes"] / run["text_bytes"]
    hours = text / (run["text_bytes"] / run["seconds"] / run["processes"]) / 3600
    return [
        f"  Before the first step {text / 1e9:,.0f} GB of text become {stored / 1e9:,.0f} GB of tokens, once, in about",
        f"  {hours:,.0f} core-hours (benchmarks/results/tokenising.json).",
    ]


def _taken(name: str) -> list[str]:
    """What a run of the recipe took whose result is kept."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    run = json.loads(path.read_text(encoding="utf-8"))
    memory = run["largest_memory_bytes"] / GIB
    return [
        f"  Measured: {run['seconds']:.0f} s in all and {memory:.1f} GiB of tensors on one {run['about']['device']}."
    ]


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


def _shares(name: str) -> tuple[float, dict[bool, float], list[str], list[str]]:
    """Of a GPU's peak, where it is alone and where it is not (with several micro-batches a step, and with one), and
    where each is from."""
    runs = [run for run in _result("scaling")["runs"] if run.get("mfu") and run.get("row") is None]
    most = max(run["micro_batches"] for run in runs if run["processes"] > 1)  # the nearest to many
    alone, *_ = (run["mfu"] for run in runs if run["processes"] == 1 and run["micro_batches"] == most)
    beside = {
        count > 1: max(run["mfu"] for run in runs if run["processes"] > 1 and run["micro_batches"] == count)
        for count in (1, most)
    }
    origin, one = "scaling", alone
    if name in SIZES:
        origin = SIZES[name]
        one, *_ = (r["mfu"] for r in _result(origin)["steps"] if r["implementation"] == "ours" and r.get("mfu"))
    several = {many: one * share / alone for many, share in beside.items()}
    said = [
        f"  Memory: estimated. Time of steps: at {one:.0%} of the peak on one, as measured on an",
        f"  {_device(origin)} (benchmarks/results/{origin}.json).",
    ]
    of_several = [
        f"  On several at {several[True]:.0%}, or {several[False]:.0%} where a step is one micro-batch, as two",
        f"  {_device('scaling')} of one machine reach with the 1.3B under FSDP2 (scaling.json); what slower links",
        "  between machines take is not in it.",
    ]
    return one, several, said, of_several


def _device(name: str) -> str:
    return _result(name)["about"]["device"]


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
