"""Train by a recipe although kill -9 comes at random: `… -m tests.training.killed RECIPE SEED KILLS LONGEST OVERRIDE…`.

Each try is a process of its own (a fork, so that nothing is imported anew), killed at most LONGEST seconds after its
first step began, or one in five while it still prepares, until so many were; the next is left alone.
The last line printed is how many checkpoints there were at each kill.
"""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from flash_gsa.training.events import Event, Started
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.trainer import train


def say_started(tell: int, event: Event) -> None:
    if isinstance(event, Started):
        os.write(tell, b".")


def main(file: str, seed: int, kills: int, longest: float, *overrides: str) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(file, list(overrides))
    folder, when = Path(recipe.output_dir) / "checkpoints", random.Random(seed)
    present = []
    for turn in range(kills + 1):
        began = time.monotonic()
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            train(recipe, on_event=partial(say_started, tell))
            os._exit(0)
        os.close(tell)
        if turn < kills:
            if when.random() > 0.2:
                os.read(told, 1)  # also returns if the child has ended
                time.sleep(when.uniform(0, longest))
            else:
                time.sleep(when.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
        os.close(told)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"try {turn} failed after {time.monotonic() - began:.2f} s"
            assert turn == kills, f"the run ended by itself before kill {turn + 1}; it needs more steps"
        present.append(len(list(folder.glob("step-*"))) if folder.exists() else 0)
    print(present)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
