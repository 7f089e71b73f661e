"""What several processes have found, run once for all tests of this folder."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import made_once
from tests.parallel.ranks import CASES, INTERPRETED, ON_GPUS


def _run(cases, tmp_path_factory, name, **environment):
    """What each of as many processes as the largest case has found, all at once."""
    ranks = max(cases)
    folder = made_once(tmp_path_factory, name, lambda folder: _launch(folder, ranks, environment))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _launch(folder, ranks, environment):
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.ranks", str(folder), str(rank), str(ranks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=560)[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(said)


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    return _run(CASES, tmp_path_factory, "parallel")


@pytest.fixture(scope="session")
def found_by_kernels(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")
    return _run(INTERPRETED, tmp_path_factory, "parallel_kernels", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def found_on_gpus(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cases = {ranks: several for ranks, several in ON_GPUS.items() if ranks <= torch.cuda.device_count()}
    return _run(cases, tmp_path_factory, "parallel_gpus", RANKS_ON="gpus")
