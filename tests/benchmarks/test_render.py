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
