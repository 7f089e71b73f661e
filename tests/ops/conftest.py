import pytest
import torch

from flash_gsa.ops import Problem, backend_names, explain

from . import judge

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=backend_names())
def backend(request) -> str:
    """Every registered backend that runs on a device of this machine; `helpers.call` skips what one cannot run."""
    reasons = [
        dict(explain(Problem(B=1, T=8, HQ=1, H=1, K=4, V=4, M=4, dtype=torch.float32, device=device)))[request.param]
        for device in DEVICES
    ]
    if None not in reasons:
        pytest.skip(f"{request.param}: {reasons[-1]}")
    return request.param


@pytest.fixture(params=["triton", "chunk"])
def gpu_backend(request) -> str:
    """Every backend that is meant for GPUs, on a machine that has one; `helpers.call` skips what one cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def errors_are_recorded(request):
    """What the judge found in a test on a GPU goes into the record of the run (`tests/record.py`)."""
    judge.seen.clear()
    yield
    if judge.seen and request.node.get_closest_marker("gpu"):
        request.node.user_properties.append(("errors", [tuple(entry) for entry in judge.seen]))
