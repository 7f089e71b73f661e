"""What the host does of a call is measured without a GPU, and leaves nothing idle behind."""

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from benchmarks import host, render  # noqa: E402
from flash_gsa.ops.triton import ahead, launching, plan  # noqa: E402

BEFORE = launching._compile, ahead.INTERPRETED, triton.runtime.driver._active


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(host, "BUDGET", 0.003)


def test_a_result_with_every_time(quickly, tmp_path, capsys):
    threads = torch.get_num_threads()
    host.main(["--output", str(tmp_path / "host.json")])
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "host.json").read_text())
    assert result["launches"] == 8  # prepare, two of a forward, five of a backward
    assert len(result["microseconds"]) == 7
    assert all(value > 0 for value in result["microseconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == 7
    shown = render.host(result)
    assert all(f"| {name} | {value:.1f} |" in shown for name, value in result["microseconds"].items())


def test_nothing_idle_is_left_behind():
    with host.idle_launches() as launched:
        forward, both = host.operator()
        forward(None)
        assert launched == ["prepare", "states_forward", "outputs"]
        both(None)
        both(None)
        assert len(launched) == 3 + 6  # the forward that keeps something has another `outputs`
    assert (launching._compile, ahead.INTERPRETED, triton.runtime.driver._active) == BEFORE
    assert not plan._plans
    assert launching.variant.cache_info().currsize == plan.variants.cache_info().currsize == 0


def test_boundaries_as_if_on_the_device():
    packed = torch.tensor([0, 100, 256], dtype=torch.int32)
    with host.idle_launches() as launched, host.as_on_the_device():
        _, both = host.operator()
        both(packed)
        both(packed)
    assert launched.count("prepare") == 1
    assert launched.count("first_parts") == 2  # for chunks, which all sequences have, and for what is walked
    assert launched[:3] == ["first_parts", "sequences_of_parts", "prepare"]


def test_a_launch_is_quicker_unwatched_and_does_the_same():
    told = []
    with host.idle_launches() as launched:
        launch = host.a_launch()
        idle = launch()
        idle.run = lambda *what: told.append(what)
        launch()
        with host.watched():
            launch()
    assert len(launched) == 1
    ours, theirs = told
    metadata = slice(6, 9)  # what a launch is called and the hooks, which only those who watch are told
    assert ours[metadata] == (None, None, None)
    assert None not in theirs[metadata]
    assert ours[:6] + ours[9:] == theirs[:6] + theirs[9:]
    assert not triton.knobs.runtime.launch_enter_hook.calls
