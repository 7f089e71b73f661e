"""The figures in the documents are those of the result files."""

import json

import pytest

from benchmarks import render


@pytest.mark.parametrize("name", render.DOCUMENTS)
def test_documents_are_up_to_date(name):
    text = (render.ROOT / name).read_text(encoding="utf-8")
    assert render.BLOCK.search(text)
    assert render.rendered(text) == text, "run python -m benchmarks.render"


@pytest.mark.parametrize("path", sorted((render.ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_result_files_say_where_they_come_from(path):
    about = json.loads(path.read_text(encoding="utf-8"))["about"]
    for key in ("command", "date", "commit", "device", "versions"):
        assert about[key], key


@pytest.mark.parametrize("name", render.FILES)
def test_blocks_that_share_a_file(name, tmp_path, monkeypatch):
    assert render.RENDERERS.keys() >= {name, render.FILES[name]}
    assert render.block(name) != render.block(render.FILES[name])
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert render.block(name) == "Not measured yet."


def test_gpu_tests_say_what_failed_and_was_skipped():
    about = {"command": "pytest", "date": "2026-11-25", "commit": "new", "device": "a GPU", "versions": {"torch": "2"}}
    result = {
        "about": about,
        "counts": {"passed": 1146, "skipped": 17},
        "skipped": {"no float64": 17},
        "seconds": 259.0,
    }
    assert render.gpu_tests(result).startswith("1,146 passed; 17 skipped (no float64) in 4 min 19 s.")
    result = {"about": about, "counts": {"passed": 3, "failed": 2}, "skipped": {}, "seconds": 61.0}
    assert render.gpu_tests(result).startswith("2 failed, 3 passed in 1 min 01 s.")
    numbers = {"compared": 1200, "median": 0.987, "largest": 2.5, "above_2": 3, "largest_of_allowed": 0.9}
    errors = [{"format": "float16", "result": name, **numbers} for name in ("o", "dq")]
    text = render.gpu_tests(result | {"errors": errors})
    assert "| float16 | `o` | 1,200 | 0.99 | 2.50 | 3 | 0.90 |" in text
    assert "|  | `dq` | 1,200 |" in text


def test_drift_has_a_line_a_span_and_state():
    about = {"command": "drift", "date": "2026-11-25", "commit": "new", "device": "a GPU", "versions": {"torch": "2"}}
    rows = [
        {"state": state, "span": span, "steps": steps, "output": error / 100, "states": 0.0}
        for state, span, steps, error in (
            ("float32", 10, 10, 9.0),
            ("float32", 10, 100, 0.1),
            ("float32", 10, 1000, 0.2),
            ("bfloat16", 10, 100, 3.0),
            ("bfloat16", 10, 1000, 4.5),
        )
    ]
    text = render.drift({"about": about, "rows": rows})
    assert "error of o, %, after 1,000 tokens" in text
    assert "| 10 | float32 | 0.10 | 0.20 |" in text
    assert "| 10 | bfloat16 | 3.00 | 4.50 |" in text
    assert "9.00" not in text
