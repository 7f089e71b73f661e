"""The table of estimated and measured memory."""

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
