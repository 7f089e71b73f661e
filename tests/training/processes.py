"""One of several processes that train together: `torchrun … -m tests.training.processes RECIPE RUN…`.

Each RUN is a JSON object: {"overrides": […], "after": [folder, step], "killed": step, "pass": tokens}. With "after",
the run goes on from that checkpoint of another run, whose recipe it takes over; with "killed", the first process is
killed at that step, as soon as there is a checkpoint; with "pass", held-out documents are scored so many tokens at a
time. One run follows the other in the same processes, because starting them costs more than a run. What is refused
leaves its message in DIR/refused-RANK.txt.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import flash_gsa.training.trainer as trainer
from flash_gsa.errors import UsageError
from flash_gsa.training import held_out
from flash_gsa.training.events import Event, Stepped
from flash_gsa.training.recipe_file import load_recipe

TOKENS_A_PASS = held_out._TOKENS_A_PASS


def main(file: str, *runs: str) -> None:
    torch.set_num_threads(1)
    trainer.write_report = lambda run_dir: run_dir / "report.html"  # its pictures take longer than these runs
    # Which the runs share.
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    for run in map(json.loads, runs):
        recipe = load_recipe(file, run["overrides"])
        held_out._TOKENS_A_PASS = run.get("pass", TOKENS_A_PASS)
        folder = Path(recipe.output_dir)
        if "after" in run and dist.get_rank() == 0:
            go_on_from(Path(run["after"][0]), run["after"][1], folder)
        dist.barrier()
        try:
            trainer.train(recipe, **{"on_event": killed_at(run["killed"], folder)} if "killed" in run else {})
        except UsageError as error:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"refused-{dist.get_rank()}.txt").write_text(str(error))
    dist.destroy_process_group()


def killed_at(step: int, folder: Path):
    """A listener that ends its process, the first, at a step, after the first checkpoint has come to be."""

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.record["step"] == step:
            end = time.monotonic() + 60
            while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def go_on_from(other: Path, step: int, folder: Path) -> None:
    """A copy of another run as it was when the checkpoint of `step` had just been written."""
    shutil.copytree(other, folder, ignore=shutil.ignore_patterns("refused*", ".lock"))
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name != f"step-{step:08d}":
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
