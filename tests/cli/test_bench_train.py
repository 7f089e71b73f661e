"""`flash-gsa bench train`, as typed, with a tiny model on the CPU."""

import json

import pytest


def test_a_tiny_run_writes_a_result_a_profile_and_pictures(run, tmp_path):
    words = ["--lengths", "64", "--peers", "ours", "--variants", "plain", "--only", "steps,profile", "--device", "cpu"]
    files = {name: tmp_path / f"{name}.json" for name in ("output", "profile")}
    paths = [word for name, path in files.items() for word in (f"--{name}", path)]
    answer = run("bench", "train", *words, *paths, "--plots", tmp_path / "pictures")
    assert answer.status == 0, answer.err
    assert "[2/3] steps ours plain, 1x64: " in answer.out
    assert "Where " in answer.out
    result = json.loads(files["output"].read_text(encoding="utf-8"))
    assert result["about"]["command"] == f"flash-gsa bench train {' '.join(words)}"
    assert [r["problem"] for r in result["steps"]] == [None]
    assert result["ceilings"] is None
    profile = json.loads(files["profile"].read_text(encoding="utf-8"))
    assert profile["profile"] == result["profile"]
    assert profile["profile"][0]["kernels"]
    assert (tmp_path / "pictures" / "train_cpu-speed.png").exists()
    again = run("bench", "plots", files["output"], tmp_path / "again")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / "train_cpu-speed.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--peers", "olurs"), "Did you mean 'ours'?"),
        (("--lengths", "2048,x"), "--lengths is '2048,x'; expected whole numbers"),
        (("--lengths", "48", "--device", "cpu"), "sequences of 48 tokens do not make up the 64 tokens of a step"),
    ],
)
def test_mistakes_are_told_without_traceback(run, words, told):
    answer = run("bench", "train", *words)
    assert answer.status == 2
    assert told in answer.err
    assert "Traceback" not in answer.err


def test_the_help_names_what_there_is(run):
    answer = run("bench", "train", "--help")
    assert answer.status == 0
    for word in ("flash-gsa bench train --quick", "linear-loss", "pure_bf16", "cold_start"):
        assert word in answer.out
