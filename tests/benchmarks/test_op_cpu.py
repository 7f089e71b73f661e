"""The CPU benchmark checks before it measures, and says what its figures belong to."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import op_cpu
from flash_gsa.ops import registry

SMALL = (op_cpu.Shape(T=70, HQ=2, H=1, K=4, V=5, M=6), op_cpu.Shape(T=80, H=2, HQ=2, K=4, V=4, M=4, lengths=(70, 1, 9)))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(op_cpu, "SHAPES", SMALL)
    monkeypatch.setattr(op_cpu, "TARGET", SMALL[0])
    monkeypatch.setattr(op_cpu, "LONGEST_REFERENCE", 75)
    monkeypatch.setattr(op_cpu, "CHECKED_WITH_GRADIENTS", 66)


def test_a_run(tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    op_cpu.main(["--out", str(out), "--seconds", "0"])
    written = json.loads(out.read_text())
    assert {"command", "date", "commit", "device", "cores", "threads", "versions"} <= written["about"].keys()
    assert written["about"]["versions"]["torch"] == torch.__version__
    found = {(r["shape"]["T"], r["backend"], r["pass"]) for r in written["results"]}
    assert found == {
        (T, backend, name)
        for T in (70, 80)
        for backend in ("reference", "chunk")
        for name in ("forward", "forward + backward")
        if (T, backend) != (80, "reference")
    }
    assert all(r["seconds"] > 0 and r["repeats"] == 1 for r in written["results"])
    assert all(r["error"] < 1e-5 for r in written["results"] if r["backend"] == "chunk")
    shown = capsys.readouterr().out
    assert "times faster" in shown
    assert "wanted: at least 20" in shown


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_nothing_is_timed_when_values_or_gradients_are_wrong(tmp_path, monkeypatch, what):
    right = registry._backends["chunk"]

    def wrong(q, k, v, *rest):
        if what == "values":
            return right.forward(q, k * 1.001, v, *rest)
        return right.forward(q, k.detach() + 0.999 * (k - k.detach()), v, *rest)

    monkeypatch.setitem(registry._backends, "chunk", replace(right, forward=wrong))
    with pytest.raises(SystemExit, match=r"chunk is wrong at B 1, T 70.*No times are taken"):
        op_cpu.main(["--out", str(tmp_path / "figures.json")])
    assert not (tmp_path / "figures.json").exists()


def test_shapes_are_shortened_for_their_gradients():
    assert op_cpu.shortened(op_cpu.Shape(T=10)).T == 10
    assert op_cpu.shortened(op_cpu.Shape(T=100)).T == 66
    packed = op_cpu.shortened(op_cpu.Shape(T=801, lengths=(400, 1, 400)))
    assert packed.lengths == (32, 1, 32)
    assert packed.T == 65
