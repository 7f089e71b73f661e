"""`flash-gsa report`."""

import json

from flash_gsa.training.recipe_file import load_recipe, recipe_to_yaml


def test_report_says_where_the_page_is(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("mqar_tiny")))
    record = {"kind": "train", "step": 1, "tokens": 64, "seconds": 0.5, "loss": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    answer = run("report", tmp_path)
    assert answer.status == 0
    assert answer.out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


def test_report_of_what_is_no_run(run, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        answer = run("report", place)
        assert answer.status == 2
        assert "is not the folder of a run" in answer.err
