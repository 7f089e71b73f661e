"""Training on one GPU and on several, by the same recipe: tokens a second, memory, and what waiting for data takes.

    python -m benchmarks.scaling --processes 2 --output benchmarks/results/scaling.json

Each configuration runs in processes of its own, by torchrun: a shipped recipe's model, engine, loss and optimiser, on
packed rows of made-up documents, read from a store as a run reads them. Every process computes as many rows at once,
and as often a step, as the one process does, so that twice the tokens a second is the best that two can do. The last
are one row, too long for one GPU, first on one, then cut over all; and on one that computes all blocks again in the
backward, which fits and takes the same steps: their first loss and gradient norm are to agree.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flash_gsa.benchmarking.about import about, write
from flash_gsa.data import NOT_SCORED, PackedBatches, Part, load_tokenizer, prepare_tokens
from flash_gsa.models import GSAForCausalLM
from flash_gsa.models.flops import training_flops
from flash_gsa.training.engines import open_engine
from flash_gsa.training.feed import Feed
from flash_gsa.training.model import model_config
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.trainer import step_loss

WARM, TIMED = 4, 12
VOCABULARY = 32_000
ONE, REPLICAS, SHARDED = "engine={kind: single}", "engine={kind: ddp}", "engine={kind: fsdp2}"
AGAIN = "engine={kind: single, checkpointing: all}"
GROUPS = "engine={kind: hsdp, replicas: 2, reshard_after: step}"
BY_STEP, CUT = "engine={kind: fsdp2, reshard_after: step}", "engine={kind: fsdp2, context: PROCESSES}"
# Name, processes (2 stands for those that were asked for), micro-batches a step, engine, and where a step is one row,
# its tokens: as many times those that a process computes at once elsewhere, and times the processes asked for. A step
# of one micro-batch shows what exchanging takes at its most; one of several is nearer to a recipe's half a million
# tokens.
CONFIGURATIONS = (
    ("one GPU", 1, 1, ONE, None),
    ("FSDP2", 2, 1, SHARDED, None),
    ("FSDP2, `reshard_after: step`", 2, 1, BY_STEP, None),
    ("DDP", 2, 1, REPLICAS, None),
    ("one row, cut over all (`context`), FSDP2", 2, 1, CUT, 1),
    ("one GPU", 1, 4, ONE, None),
    ("FSDP2", 2, 4, SHARDED, None),
    ("FSDP2, `reshard_after: step`", 2, 4, BY_STEP, None),
    ("a row twice as long, one GPU", 1, 1, ONE, 2),
    ("a row twice as long, cut over all (`context`), FSDP2", 2, 1, CUT, 2),
    ("a row twice as long, one GPU, `checkpointing: all`", 1, 1, AGAIN, 2),
)
OF_FOUR = (("HSDP, two groups, `reshard_after: step`", 2, 1, GROUPS, None),)


def configurations(asked: int) -> tuple[tuple[str, int, int, str, int | None], ...]:
    """Those for so many processes; HSDP is another thing than DDP where a group has more than one."""
    return CONFIGURATIONS + (OF_FOUR if asked >= 4 and asked % 2 == 0 else ())


def settings(
    engine: str, processes: int, asked: int, micro_batches: int, row: int | None, rows: int, length: int
) -> list[str]:
    """What a recipe is overridden with so that every process computes `rows · length` tokens at once, or all of them
    one row of `row · asked` times as many."""
    chosen = engine.replace("PROCESSES", str(processes))
    if row is not None:
        return [chosen, "batch.rows=1", "batch.micro_rows=1", f"batch.length={row * asked * rows * length}"]
    return [chosen, f"batch.rows={rows * processes * micro_batches}", f"batch.micro_rows={rows}"]


def write_text(folder: Path) -> None:
    """Documents of made-up words, enough for the steps of all configurations."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(5000)]
    with (folder / "text.jsonl").open("w") as lines:
        for _ in range(3000):
            lines.write(json.dumps({"text": " ".join(rng.choice(words, rng.integers(50, 900)))}) + "\n")


def measure(folder: Path, recipe_name: str, overrides: list[str]) -> dict[str, Any] | None:
    """The record of this process's configuration; None in processes other than the first."""
    recipe = load_recipe(recipe_name, overrides, data_named=False)
    engine = open_engine(recipe)
    rows, count = recipe.batch.micro_batches(engine.ranks, engine.context)
    torch.manual_seed(0)
    with engine.device:  # billions of random numbers take a CPU as long as all the steps
        model = GSAForCausalLM(model_config(recipe, VOCABULARY))
    flops = training_flops(model, recipe.batch.length)
    engine.prepare(model, recipe.optimizer)
    store = prepare_tokens(str(folder / "text.jsonl"), load_tokenizer("byte"), cache_dir=folder / "tokens")
    batches = PackedBatches(Part(store), length=recipe.batch.length, rows=recipe.batch.rows, seed=0)
    groups, group = engine.ranks // engine.context, engine.rank // engine.context
    feed = Feed(batches, [slice(r, r + rows) for r in ((i * groups + group) * rows for i in range(count))])
    seconds, waits, first = [], [], None
    for step in range(WARM + TIMED):
        began = time.monotonic()
        micro = feed.take()
        scored = engine.total(sum(int((b.targets != NOT_SCORED).sum()) for b in micro))
        losses = []
        for i, batch in enumerate(micro):
            on_device = engine.stretch(batch).to(engine.device)
            losses.append(engine.accumulate(step_loss, on_device, scored, last=i == len(micro) - 1))
        outcome = engine.update(losses, recipe.optimizer.lr, recipe.optimizer.clip, seconds=0.0, stop=False)
        assert outcome.finite
        first = first or outcome
        if step >= WARM:
            seconds.append(time.monotonic() - began)
            waits.append(feed.seconds)
    feed.close()
    memory = max(engine.gather(engine.peak_memory()))
    step_seconds = statistics.median(seconds)
    tokens = recipe.batch.tokens / step_seconds
    peak = engine.peak_flops()
    record = {
        "tokens_a_step": recipe.batch.tokens,
        "seconds": step_seconds,
        "tokens_per_second": tokens,
        "mfu": None if peak is None else tokens * flops / (peak * engine.ranks),
        "peak_bytes": memory,
        "data_share": sum(waits) / sum(seconds),
        "loss": outcome.loss,
        "first_loss": first.loss,
        "first_gradient_norm": first.norm,
    }
    is_main = engine.is_main
    engine.close()
    return record if is_main else None


def launch(processes: int, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Measures in `processes` new processes; the record, or what went wrong."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "record.json"
        command += ["-m", "benchmarks.scaling", "--measure", str(result), *arguments]
        try:
            done = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"problem": f"took longer than {seconds:.0f} s"}
        if result.exists():
            return json.loads(result.read_text())
        lines = [line for line in done.stderr.strip().splitlines() if "Error" in line] or [f"exit {done.returncode}"]
        return {"problem": lines[-1][:300]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--recipe", default="gsa_1.3b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="rows a process and micro-batch")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="after which the engine is set"
    )
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a configuration")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        record = measure(options.folder, options.recipe, options.override)
        if record is not None:
            options.measure.write_text(json.dumps(record))
        return
    if options.output is None:
        parser.error("--output is missing: the file for the result")
    command = f"python -m benchmarks.scaling --recipe {options.recipe} --processes {options.processes}"
    command += "".join(f" --override '{o}'" for o in options.override)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = load_recipe(options.recipe, options.override, data_named=False).batch.length
    result: dict[str, Any] = {"about": about(command, device, options.commit), "recipe": options.recipe}
    result |= {"asked": options.processes, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        asked = options.processes
        for name, several, micro_batches, engine, row in configurations(asked):
            processes = 1 if several == 1 else asked
            chosen = settings(engine, processes, asked, micro_batches, row, options.rows, length)
            overrides = [*options.override, *chosen]
            arguments = ["--folder", folder, "--recipe", options.recipe]
            arguments += [part for o in overrides for part in ("--override", o)]
            record = {"name": name, "processes": processes, "micro_batches": micro_batches, "row": row}
            record |= {"overrides": overrides}
            record |= launch(processes, arguments, options.limit)
            result["runs"].append(record)
            print(record, flush=True)
            write(result, options.output)


if __name__ == "__main__":
    main()
