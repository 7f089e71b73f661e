"""The table of estimated and measured memory."""

import json
import sys

import pytest

from benchmarks.memory import main
from benchmarks.render import memory

ABOUT = {"command": "measure", "date": "2026-11-27", "commit": "new", "device": "a GPU", "versions": {"torch": "2"}}
ROW = {
    "recipe": "gsa_1.3b",
    "overrides": ["engine.kind=single"],
    "tokens": 16384,
    "estimated_bytes": 11 * 2**30,
    "measured_bytes": 10 * 2**30,
    "measured_outside_bytes": 2**29,
    "problem": None,
}


def test_estimates_stand_beside_measurements():
    failed = {key: value for key, value in ROW.items() if key != "measured_bytes"} | {"problem": "out of memory"}
    text = memory({"about": ABOUT, "rows": [ROW, failed]})
    assert "| gsa_1.3b `engine.kind=single` | 16,384 | 11.0 | 10.0 | +10 % | 0.5 |" in text
    assert "| 11.0 | out of memory |  | 0.5 |" in text


def test_todays_estimates_beside_what_was_measured(tmp_path, monkeypatch):
    asked = {"recipe": "gsa_340m", "overrides": ["tokenizer=byte", "engine={kind: single}"], "processes": 1}
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"about": ABOUT, "rows": [ROW | asked]}))
    monkeypatch.setattr(sys, "argv", ["memory", "--again", str(path)])
    main()
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["measured_bytes"] == ROW["measured_bytes"]
    assert row["estimated_bytes"] > 16 * 340e6  # weights, gradients, two moments
    assert memory(result).endswith(f"new · estimates of {result['about']['estimates']}")


@pytest.mark.parametrize("given", [[], ["--output", "a.json", "--again", "b.json"]])
def test_one_file_is_asked_for(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["memory", *given])
    with pytest.raises(SystemExit):
        main()
    assert "Give either --output FILE" in capsys.readouterr().err
