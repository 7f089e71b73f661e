"""The memory that a dry run estimates beside what steps take: `python -m benchmarks.memory --output FILE`.

    python -m benchmarks.memory --output benchmarks/results/memory.json
    torchrun --nproc-per-node 2 -m benchmarks.memory --output benchmarks/results/memory_sharded.json

Each configuration is a shipped recipe with overrides. Two steps are taken on made-up tokens, with the engine, model,
loss and optimiser of a run, each step with two micro-batches where the recipe has more than one. Measured is the most
that PyTorch had allocated, and what of the GPU is taken beside that. What runs out of memory is noted.

    python -m benchmarks.memory --again benchmarks/results/memory.json

puts today's estimates beside what was measured then, which takes no GPU.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from flash_gsa.benchmarking.about import about, commit, write
from flash_gsa.data import NOT_SCORED, Batch
from flash_gsa.models import GSAForCausalLM
from flash_gsa.training.engines import open_engine
from flash_gsa.training.estimate import GIB, estimate_memory, model_size
from flash_gsa.training.model import model_config
from flash_gsa.training.recipe import Recipe
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.trainer import step_loss

DOCUMENT = 1024  # tokens, of the text that is made up
# fmt: off
ON_ONE = (
    ("gsa_340m", "engine={kind: single}"),
    ("gsa_340m", "engine={kind: single, checkpointing: all}"),
    ("gsa_1.3b", "engine={kind: single}", "model.num_hidden_layers=6"),
    ("gsa_1.3b", "engine={kind: single}", "batch.micro_rows=4", "precision=pure_bf16"),
    ("gsa_1.3b", "engine={kind: single}"),
    ("gsa_2.7b", "engine={kind: single, checkpointing: all}"),
    ("prose_100m",),
)
ON_SEVERAL = (
    ("gsa_340m",),
    ("gsa_340m", "engine={kind: fsdp2}"),
    ("gsa_1.3b",),
    ("gsa_1.3b", "engine={kind: fsdp2}"),
    ("gsa_1.3b", "engine={kind: fsdp2, checkpointing: all}"),
    ("gsa_1.3b", "engine={kind: zero2}"),
)
# fmt: on


def measure(configuration: tuple[str, ...], processes: int) -> dict[str, Any]:
    """The record of one configuration; `problem` says why there is no measurement."""
    name, *overrides = configuration
    recipe = load_recipe(name, overrides, data_named=False)
    size = model_size(recipe)
    estimate = estimate_memory(recipe, processes, size)
    rows, count = recipe.batch.micro_batches(processes, recipe.engine.context)
    record: dict[str, Any] = {
        "recipe": name,
        "overrides": overrides,
        "processes": processes,
        "tokens": rows * recipe.batch.length,
        "estimated_bytes": estimate.tensors,
        "estimated_outside_bytes": estimate.outside,
        "problem": None,
    }
    started = time.monotonic()
    try:
        record["measured_bytes"] = _steps(recipe, size.vocabulary, rows, min(count, 2))
    except torch.OutOfMemoryError:
        record["problem"] = "out of memory"
    # The frames of a step, and with them its tensors, are gone by now.
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    record["measured_outside_bytes"] = total - free - torch.cuda.memory_reserved()
    return record | {"seconds": round(time.monotonic() - started, 1)}


def estimate_again(result: dict[str, Any]) -> None:
    """Gives every row of an earlier result the estimate of the code as it is now, and says of which commit that is."""
    for row in result["rows"]:
        recipe = load_recipe(row["recipe"], row["overrides"], data_named=False)
        memory = estimate_memory(recipe, row["processes"])
        row |= {"estimated_bytes": memory.tensors, "estimated_outside_bytes": memory.outside}
    result["about"]["estimates"] = commit()


def _steps(recipe: Recipe, vocabulary: int, rows: int, micro_batches: int) -> int:
    engine = open_engine(recipe)
    torch.manual_seed(recipe.seed)
    with engine.device:
        model = GSAForCausalLM(model_config(recipe, vocabulary))
    engine.prepare(model, recipe.optimizer)
    tokens = rows * recipe.batch.length
    starts = {*range(0, tokens + 1, recipe.batch.length), *range(DOCUMENT // 2, tokens, DOCUMENT)}
    ids = torch.randint(vocabulary, (1, tokens), device=engine.device)
    batch = Batch(ids, ids.roll(-1), torch.tensor(sorted(starts), dtype=torch.int32))
    scored = engine.total(micro_batches * int((batch.targets != NOT_SCORED).sum()))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        losses = [
            engine.accumulate(step_loss, batch, scored, last=i == micro_batches - 1) for i in range(micro_batches)
        ]
        engine.update(losses, 1e-4, recipe.optimizer.clip, seconds=0.0, stop=False)
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Measure all, print as it goes, write after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--output", type=Path, help="the file for the result")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only estimate anew, for what FILE measured")
    parser.add_argument("--commit", help="of the code, where git cannot say it")
    options = parser.parse_args()
    if (options.output is None) == (options.again is None):
        parser.error("Give either --output FILE, to measure, or --again FILE, to estimate anew for what it measured")
    if options.again is not None:
        result = json.loads(options.again.read_text(encoding="utf-8"))
        estimate_again(result)
        write(result, options.again)
        return
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    launched = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    result = {
        "about": about(f"{launched} -m benchmarks.memory", "cuda", options.commit),
        "rows": [],
    }
    for configuration in ON_ONE if processes == 1 else ON_SEVERAL:
        record = measure(configuration, processes)
        result["rows"].append(record)
        if rank == 0:
            told = record["problem"] or f"measured {record['measured_bytes'] / GIB:.2f} GiB"
            outside = record["measured_outside_bytes"] / GIB
            print(
                f"{' '.join(configuration)}: estimated {record['estimated_bytes'] / GIB:.2f} GiB, {told}, "
                f"beside it {outside:.2f} GiB; {record['seconds']} s",
                flush=True,
            )
            write(result, options.output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
