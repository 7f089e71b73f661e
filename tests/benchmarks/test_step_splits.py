"""Sweeps of decoding splits: what was measured holds the code to it, and the command that measures."""

import json
import sys
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from benchmarks import render, step_splits
from benchmarks.step_splits import EARLIER, LAYERS, LINEAR, candidates, marked, measured
from flash_gsa.ops.triton import step, step_linear

MEASURED = render.load("step_splits")


def test_what_is_chosen_is_marked():
    found = marked(MEASURED["rows"], MEASURED["multiprocessors"])
    assert found == MEASURED["rows"], "python -m benchmarks.step_splits --output FILE --minutes 0 marks them anew"


def test_what_is_chosen_is_near_the_best():
    """Within a tenth, the kernel as the split, in every case of the sweeps."""
    tried, chosen = defaultdict(list), {}
    for row in MEASURED["rows"]:
        if row["commit"] != EARLIER and row["kernel"] != "PyTorch":
            linear = row["kernel"] == "step_linear"
            case = (linear, *(row[name] for name in ("run", "layer", "sequences", "state")))
            tried[case].append(min(row["microseconds"]))
            if row.get("chosen"):
                chosen[case] = tried[case][-1]
    assert len(chosen) > 60
    assert {case: took for case, took in chosen.items() if took > 1.1 * min(tried[case])} == {}


@pytest.mark.parametrize(("layer", "linear"), [(LAYERS[1], False), (LINEAR[0], True)], ids=["slots", "linear"])
def test_a_case_has_each_split_once_and_what_is_beside_it(monkeypatch, layer, linear):
    """Timed by a stand-in that counts launches."""
    launched = []
    for module in (step, step_linear):
        monkeypatch.setattr(module, "launch", lambda *arguments: launched.append(arguments[-1]))
    monkeypatch.setattr(step_splits, "reference_linear_step", lambda *arguments: launched.append("PyTorch"))
    monkeypatch.setattr(step_splits, "IN_A_GRAPH", 1 << 24)

    def timed(call):
        before = len(launched)
        call()
        return 1e-6 * (len(launched) - before)

    rows = list(measured(layer, 2, "float32", timed, torch.device("cpu"), linear=linear))
    kernel, other = ("step_linear", "PyTorch") if linear else ("step_slots", "step")
    splits = list(candidates(kernel, layer[4]))
    assert len(splits) == len(set(splits)) > 20
    assert [row["kernel"] for row in rows] == [kernel] * len(splits) + [other]
    assert [row.get("tile") for row in rows] == [split.tile for split in splits] + [None]
    assert all(row["microseconds"] == [1.0] for row in rows), "a step's time, of as many as a graph has"
    assert marked([{"run": 1, "commit": "x"} | row for row in rows], 132)
    assert step.lies_by_slots.__name__ == "lies_by_slots"


def test_what_is_chosen_is_a_candidate():
    for kernel, layers in (("step_slots", LAYERS), ("step_linear", LINEAR)):
        for _, HQ, H, K, V in layers:
            for sequences in (4, 16, 64, 1024):
                row = {"query_heads": HQ, "heads": H, "keys": K, "values": V, "sequences": sequences}
                row |= {"state": "float32"} | ({"slots": 64} if kernel == "step_slots" else {})
                split = step_splits.chosen(row, 132)
                assert split is None or split in set(candidates(kernel, V))


def test_without_a_card(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "splits.json"

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["step_splits", "--output", str(file), *more])
        step_splits.main()

    for more, said in (((), "no CUDA device"), (("--minutes", "0"), "has no rows to mark")):
        with pytest.raises(SystemExit):
            run(*more)
        assert said in capsys.readouterr().err
    rows = [{name: value for name, value in row.items() if name != "chosen"} for row in MEASURED["rows"]]
    file.write_text(json.dumps(MEASURED | {"rows": rows}), encoding="utf-8")
    run("--minutes", "0")
    assert json.loads(file.read_text(encoding="utf-8")) == MEASURED
