"""`flash-gsa bench`, as typed, at the size that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_gsa.benchmarking.op import PARTS
from flash_gsa.cli import bench

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(what a quick run printed, its result file, the folder of its pictures), in a process of its own.

    It has to do without what only training needs: measured is also on machines with torch and little else.
    """
    folder = tmp_path_factory.mktemp("bench")
    for package in ("zstandard", "tokenizers", "transformers", "tensorboard"):
        (folder / f"{package}.py").write_text("raise ImportError('not on this machine')")
    words = ["bench", "op", "--quick", "--device", "cpu", "--output", "op.json", "--plots", "pictures"]
    command = [sys.executable, "-m", "flash_gsa", *words]
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "op.json").read_text(encoding="utf-8")), folder / "pictures"


def test_a_quick_run_measures_every_part(measured):
    out, result, pictures = measured
    assert result["suite"] == "quick"
    assert all(result[part] for part in PARTS)
    problems = [r["problem"] for part in PARTS[1:] for r in result[part] if r["problem"]]
    assert all(problem.startswith("not run: ") for problem in problems)
    own = [r for r in (*result["shapes"], *result["lengths"]) if r["implementation"] == "auto"]
    assert {r["shape"]["label"] for r in own} >= {"tiny-1x64", "packed-1x64", "tiny-1x32", "tiny-2x32"}
    for record in own:
        assert record["backend"] == "chunk"
        assert record["full_size_errors"]["o"][0] < 1e-6
        for cost in (record["forward"], record["forward_backward"]):
            assert 0 < cost["low"] <= cost["high"]
            assert cost["times_the_least"] > 0
            assert cost["peak_bytes"] is None
    layers = {(r["operation"], r["implementation"]): r for r in result["layer"]}
    assert layers.keys() == {(name, "auto") for name in ("projections", "layer", "silu", "gates", "abc_gates", "norm")}
    assert layers["layer", "auto"]["backend"] == "chunk"
    assert 0 < layers["layer", "auto"]["errors"]["df_proj.weight"][0] < 1e-5
    assert layers["norm", "auto"]["forward"]["times_the_least"] > 0
    assert "The layer" in out
    (start,) = result["cold_start"]
    assert start["first"]["seconds"] > start["first"]["first_call"] > 0
    assert start["second"]["seconds"] > 0
    assert out.count("\n[") == out.count("] ") - 1 == sum(len(result[part]) for part in PARTS[1:])
    assert "written: op.json" in out
    assert (pictures / "op_quick-time.png").stat().st_size > 1000


def test_a_result_says_where_it_comes_from(measured):
    about = measured[1]["about"]
    # Where the result goes is no part of what was measured.
    assert about["command"] == "flash-gsa bench op --quick --device cpu"
    assert {"date", "commit", "device", "cores", "threads"} <= about.keys()
    assert {"python", "flash-gsa", "torch"} <= about["versions"].keys()


def test_pictures_are_drawn_again_from_the_file(measured, run, tmp_path):
    _, result, pictures = measured
    (tmp_path / "op.json").write_text(json.dumps(result))
    answer = run("bench", "plots", tmp_path / "op.json", tmp_path / "again")
    assert answer.status == 0, answer.err
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in pictures.iterdir()}


def test_several_results_are_drawn_as_one(measured, run, tmp_path):
    _, result, pictures = measured
    later = result | {"shapes": [record | {"problem": "failed"} for record in result["shapes"]]}
    for name, content in (("op", result), ("later", later), ("training", dict.fromkeys(("gates", "steps")))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    answer = run("bench", "plots", tmp_path / "op.json", tmp_path / "op.json", tmp_path / "as-one")
    assert answer.status == 0, answer.err
    assert {p.name for p in (tmp_path / "as-one").iterdir()} == {p.name for p in pictures.iterdir()}
    # Of the later one's shapes none ran, so there is nothing to compare.
    answer = run("bench", "plots", tmp_path / "op.json", tmp_path / "later.json", tmp_path / "failed")
    assert "op_quick-speedup.png" not in {p.name for p in (tmp_path / "failed").iterdir()}
    answer = run("bench", "plots", tmp_path / "op.json", tmp_path / "training.json", tmp_path / "mixed")
    assert answer.status == 2
    assert "training.json is no result of" in answer.err


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), ("{}", "is no result"), ("x", "is no result")]
)
def test_what_is_no_result_is_not_drawn(run, tmp_path, content, words):
    if content is not None:
        (tmp_path / "op.json").write_text(content)
    answer = run("bench", "plots", tmp_path / "op.json", tmp_path)
    assert answer.status == 2
    assert words in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--only", "shapes,lenghts"), "Did you mean 'lengths'?"),
        (("--device", "cuda:77"), "there is no device 'cuda:77'"),
    ],
)
def test_mistakes_are_told_without_traceback(run, words, told):
    answer = run("bench", "op", "--quick", *words)
    assert answer.status == 2
    assert told in answer.err
    assert "Traceback" not in answer.err


def test_drift_is_measured(run, tmp_path):
    answer = run("bench", "drift", "--steps", 20, "--device", "cpu", "--output", tmp_path / "drift.json")
    assert answer.status == 0, answer.err
    assert answer.out.count("state in bfloat16: o off by") == 3
    about = json.loads((tmp_path / "drift.json").read_text(encoding="utf-8"))["about"]
    assert about["command"] == "flash-gsa bench drift --steps 20 --device cpu"
    answer = run("bench", "drift", "--steps", 0)
    assert (answer.status, "at least 1" in answer.err, "Traceback" in answer.err) == (2, True, False)


def test_a_result_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").write_text("")
    answer = run("bench", "drift", "--steps", 1, "--device", "cpu", "--output", tmp_path / "file" / "drift.json")
    assert answer.status == 2
    assert "cannot be written" in answer.err


def test_help_teaches(run):
    assert "bench" in run("--help").out
    assert "plots" in run("bench", "--help").out
    answer = run("bench", "op", "--help")
    assert answer.status == 0
    assert "flash-gsa bench op --quick" in answer.out


def test_the_benchmark_itself_does_without_pydantic():
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from flash_gsa.benchmarking import cold_start, decoding, measurements, op, plots\n"
        "import flash_gsa.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_may_stand_with_spaces():
    assert bench._names(" a, b,,") == ("a", "b")
    assert bench._names(None) == ()
