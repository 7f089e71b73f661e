"""What a run ran on: about.json in its folder, one entry for each time it was started or resumed."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from flash_gsa.benchmarking.about import about, write

STARTS_FILE = "about.json"
COMMIT = "FLASH_GSA_COMMIT"
"""The environment variable that says which commit a copy of the code without git is."""


def record_start(run_dir: Path, *, resume_step: int | None, device: str, engine: str) -> None:
    """Adds this start to about.json: command, date, commit, device, versions (see `flash_gsa.benchmarking.about`).

    Args:
        resume_step: the step the run goes on from; None: it begins anew, and earlier starts are forgotten.
        device: "cpu", "cuda" or "cuda:N", whose name is noted.
        engine: how the run is spread over devices, in words.

    Raises:
        UsageError: the file cannot be written.
    """
    before = [] if resume_step is None else read_starts(run_dir)
    start = {"step": resume_step or 0, "engine": engine, **about(_command(), device, os.environ.get(COMMIT))}
    write({"starts": [*before, start]}, run_dir / STARTS_FILE)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; none where no about.json is."""
    path = run_dir / STARTS_FILE
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []


def _command() -> str:
    """What was typed: the program and its arguments, behind torchrun where several processes run them."""
    program = Path(sys.argv[0]).name
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        launcher = ["torchrun", *(["--nnodes", str(machines)] if machines > 1 else [])]
        launcher += ["--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(world))]
        # torchrun takes a Python module or file, not the program that an installation puts on the path.
        started = [*launcher, *(["-m", "flash_gsa"] if program in ("__main__.py", "flash-gsa") else [program])]
    else:
        started = ["python", "-m", "flash_gsa"] if program == "__main__.py" else [program]
    return shlex.join([*started, *sys.argv[1:]])
