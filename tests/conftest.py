"""What every test shares: one thread, a fixed seed, and the devices there are."""

import os
import shutil
import signal
import time

import pytest
import torch
from filelock import FileLock

pytest_plugins = ["tests.record"]  # --record FILE

# A test run started in the background by a script may have inherited an ignored SIGINT, and would pass that on to the
# programs whose reaction to Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of several GPUs each process of pytest-xdist takes another one first, and still sees the others.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (count := torch.cuda.device_count()) > 1:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    turn = int(worker.removeprefix("gw")) % count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[turn:] + devices[:turn])


@pytest.hookimpl(trylast=True)  # of what -m, -k and the like have left
def pytest_collection_modifyitems(config, items):
    """Tests marked `long` begin first, each in another process: `--dist worksteal` gives each process one stretch of
    all tests, and never takes a test away from a process that is about to run it."""
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = long_first(items, processes, lambda item: item.get_closest_marker("long") is not None)


def long_first(items, processes, is_long):
    """`items` in which those that are long begin the stretches, of one length or nearly, that `processes` get."""
    long, others, found = [x for x in items if is_long(x)], [x for x in items if not is_long(x)], []
    for process in range(processes):
        share = (len(items) - len(found)) // (processes - process)
        begin = long[process::processes]
        rest = max(share - len(begin), 0)
        found += begin + others[:rest]
        others = others[rest:]
    return found


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Workers of pytest-xdist share the cores; and small tensors gain nothing from a second thread.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu_memory_for_others(request):
    """What PyTorch keeps of a GPU's memory after a test goes back: many processes share it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def gpu_room(tmp_path_factory):
    """gpu_room(gib): wait until so much of the GPU's memory is free; one test at a time, of all with this GPU first."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def wait(gib: float, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while torch.cuda.mem_get_info()[0] < gib * 2**30:
            if time.monotonic() > end:
                pytest.skip(f"needs {gib:g} GiB of free GPU memory")
            time.sleep(0.2)

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    with FileLock(shared_folder(tmp_path_factory) / f"gpu_room{first}.lock"):
        yield wait


def shared_folder(tmp_path_factory):
    """The temporary folder that all processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory, name, make):
    """The folder that `make(folder)` filled: once, however many processes of pytest-xdist ask for it."""
    folder = shared_folder(tmp_path_factory) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU and, in tests marked gpu, a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
