"""`export` writes into its own folders only."""

import json

import pytest


def test_an_export_is_written_and_replaced(run, checkpoint, tmp_path):
    target = tmp_path / "deep" / "model"
    for dtype, name in (("as-trained", "float32"), ("bf16", "bfloat16")):
        answer = run("export", checkpoint, target, "--dtype", dtype)
        assert answer.status == 0, answer.err
        assert json.loads((target / "config.json").read_text())["dtype"] == name
    assert (target / "model.safetensors").is_file()
    assert (target / "tokenizer.json").is_file()


OURS = '{"model_type": "gsa"}'


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": "documents"},
        {"recipe.yaml": "name: x", "config.json": OURS},
        {"metrics.jsonl": "", "config.json": OURS},
        {"manifest.json": "{}", "config.json": OURS},
        {"config.json": '{"model_type": "llama"}'},
        {"config.json": "not JSON"},
    ],
    ids=["other files", "recipe", "metrics", "checkpoint", "other model", "other config"],
)
def test_a_folder_with_other_things_is_refused_and_left_alone(files, run, checkpoint, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for name, content in files.items():
        (target / name).write_text(content)
    answer = run("export", checkpoint, target)
    assert answer.status == 2
    said = " ".join(answer.err.split())
    assert "holds other things than an earlier export" in said
    assert "Give another folder" in said
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_a_file_and_the_models_own_folder_are_refused(run, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for target, message in ((file, "is a file. Expected a folder"), (checkpoint, "that the model is read from")):
        answer = run("export", checkpoint, target)
        assert answer.status == 2
        assert message in " ".join(answer.err.split())
    assert file.read_text() == "kept"
