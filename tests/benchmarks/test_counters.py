"""Counters of a GPU: what ncu prints becomes records, then a table; what it does not print is told."""

import pytest

from benchmarks import counters
from benchmarks.render import counters as rendered
from flash_gsa.benchmarking.shapes import SUITES
from flash_gsa.errors import UsageError

NAMES = ["ID", "Kernel Name", *counters.COUNTERS.values(), *(counters.STALL.format(name) for name in counters.STALLS)]


def printed(**changes: str) -> list[str]:
    """Lines of ncu for one launch of `outputs`; `changes` by counter."""
    values = dict.fromkeys(NAMES, "0") | {"Kernel Name": "outputs"}
    given = {"seconds": "90,000", "bytes_per_second": "2,000,000,000,000", "registers": "255"}
    values |= {counters.COUNTERS[name]: value for name, value in given.items()}
    values |= {counters.STALL.format("long_scoreboard"): "6", counters.STALL.format("selected"): "2"}
    values |= changes
    rows = [NAMES, [""] * len(NAMES), [values[name] for name in NAMES]]
    return ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)]


def test_a_launch_becomes_a_record_and_a_row():
    (record,) = counters.read(printed())
    assert record["kernel"] == "outputs"
    assert record["seconds"] == pytest.approx(90e-6)
    assert (record["bytes_per_second"], record["registers"]) == (2e12, 255)
    assert record["stalls"] == {"long_scoreboard": 0.75, "selected": 0.25}
    about = {"command": "c", "device": "d", "versions": {}, "date": "2026-11-26", "commit": "x", "threads": 1}
    text = rendered({"about": about, "shapes": [{"shape": {"label": "340M-8x2048"}, "kernels": [record]}]})
    assert "| 340M-8x2048 | `outputs` | 90 | 180 | 2.00 | 0 | 0 | 0 | 0 | long scoreboard 75 |" in text


@pytest.mark.parametrize("value", ["n/a", ""])
def test_a_counter_without_a_value_is_named(value):
    with pytest.raises(UsageError, match=r"no dram__bytes\.sum\.per_second of outputs"):
        counters.read(printed(**{"dram__bytes.sum.per_second": value}))


def test_no_table_and_no_profiler_are_told(monkeypatch, capsys):
    with pytest.raises(UsageError, match="printed no counters"):
        counters.read(["==ERROR== ERR_NVGPUCTRPERM"])
    monkeypatch.setattr(counters.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        counters.main(["--output", "unused.json"])
    assert "a CUDA device, and there is none here" in capsys.readouterr().err
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="no ncu here"):
        counters.measure(next(shape for shape in SUITES["gpu"].shapes if shape.label in counters.LABELS))
