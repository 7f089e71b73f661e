"""`flash-gsa bench tune`, as typed where there is no GPU."""

import subprocess
import sys

import pytest
import torch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line(run):
    answer = run("bench", "tune", "--shape", "1.3B", "--budget", "9", "--jobs", "2")
    assert answer.status == 2
    assert answer.err == (
        "flash-gsa: bench tune measures kernels on a CUDA device and found none; run it where there is one\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--shape", "1.3B", "--shape", "70B"), "there is no shape '70B'; choose of 1.3B, 1.3B-long, 7B, 340M"),
        (("--kernel", "input_backward"), "Did you mean 'inputs_backward'?"),
        (("--budget", "-1"), "budget is -1"),
    ],
)
def test_mistakes_are_told_without_traceback(run, words, told):
    answer = run("bench", "tune", *words)
    assert answer.status == 2
    assert told in answer.err
    assert "Traceback" not in answer.err


def test_what_was_typed_stands_in_the_result(run, monkeypatch, tmp_path):
    from flash_gsa.benchmarking import tune

    asked = []
    monkeypatch.setattr(tune, "tune", lambda options, output, say: asked.append((options, output)))
    words = [
        "--shape",
        "1.3B",
        "--shape",
        "7B",
        "--kernel",
        "outputs",
        "--budget",
        "100",
        "--jobs",
        "3",
        "--commit",
        "12ab",
    ]
    answer = run("bench", "tune", *words, "--output", tmp_path / "tiles.json")
    assert answer.status == 0, answer.err
    ((options, output),) = asked
    assert output == tmp_path / "tiles.json"
    assert options == tune.Options(
        ("1.3B", "7B"), ("outputs",), 100.0, 3, " ".join(["flash-gsa bench tune", *words]), "12ab"
    )


def test_help_teaches(run):
    assert "tune" in run("bench", "--help").out
    answer = run("bench", "tune", "--help")
    assert answer.status == 0
    assert "flash-gsa bench tune --shape 1.3B --shape 7B --budget 100" in answer.out


def test_it_does_without_what_only_training_needs():
    code = (
        "import sys\n"
        "for name in ('pydantic', 'zstandard', 'tokenizers', 'tensorboard'): sys.modules[name] = None\n"
        "import flash_gsa.cli\n"
        "from flash_gsa.benchmarking import tune"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
