"""The record of a test run says what passed, what did not and why, with any number of processes."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import long_first

ROOT = Path(__file__).parent.parent
SUITE = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_good(n, request):
    request.node.user_properties.append(("errors", [("bfloat16", "dq", n + 0.5, n / 10)]))
    request.node.user_properties.append(("something else", n))

def test_bad():
    assert 1 + 1 == 3, "sums are off"

@pytest.fixture
def broken():
    raise RuntimeError("no fixture today")

def test_without_its_fixture(broken):
    pass

@pytest.mark.skipif(True, reason="not here")
def test_elsewhere():
    pass

def test_left_alone():
    pytest.skip("not now")

@pytest.mark.xfail(strict=True, reason="too far")
def test_known(request):
    request.node.user_properties.append(("errors", [("bfloat16", "dq", 99.0, 99.0)]))
    raise AssertionError
"""


def test_a_run_with_failures(tmp_path):
    suite, out = tmp_path / "test_made_up.py", tmp_path / "results" / "run.json"
    suite.write_text(SUITE)
    arguments = ["-p", "tests.record", "-p", "no:cacheprovider", "-n", "2", "--record", str(out), str(suite)]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["about"]["command"].startswith("python -m pytest -p tests.record")
    assert record["about"]["versions"]["torch"] == torch.__version__
    assert record["about"]["device"]
    assert record["exit_status"] == 1
    assert record["processes"] == 2
    assert record["counts"] == {"passed": 3, "failed": 2, "skipped": 3}
    assert list(record["by_file"].values()) == [record["counts"]]
    failed = {name.partition("::")[2]: words for name, words in record["failed"].items()}
    assert failed == {
        "test_bad": "AssertionError: sums are off",
        "test_without_its_fixture": "RuntimeError: no fixture today",
    }
    assert record["skipped"] == {"not here": 1, "not now": 1, "too far": 1}
    assert record["seconds"] > 0
    (errors,) = record["errors"]
    told = {"median": 1.5, "largest": 2.5, "above_2": 1, "largest_of_allowed": 0.2}
    assert errors == {"format": "bfloat16", "result": "dq", "compared": 3, **told}
    assert len(record["slowest"]) == 8
    log = out.with_suffix(".log").read_text(encoding="utf-8").splitlines()
    assert Counter(line.split()[0] for line in log) == record["counts"]
    assert any(re.fullmatch(r"failed +\d+\.\d\d s +\S*test_made_up\.py::test_bad", line) for line in log)


def test_a_file_that_cannot_be_collected(tmp_path):
    suite, out = tmp_path / "test_made_up.py", tmp_path / "run.json"
    suite.write_text("import a_module_that_does_not_exist")
    arguments = ["-p", "tests.record", "-p", "no:cacheprovider", "-n", "0", "--record", str(out), str(suite)]
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["exit_status"] == 2
    assert record["counts"] == {"failed": 1}
    assert "a_module_that_does_not_exist" in next(iter(record["failed"].values()))


@pytest.mark.parametrize(("items", "processes"), [(1538, 56), (100, 7), (40, 1), (40, 20), (7, 20), (0, 2)])
def test_long_tests_begin_the_stretches_of_processes(items, processes):
    long = set(range(items)[2:12])
    found = long_first(list(range(items)), processes, long.__contains__)
    assert sorted(found) == list(range(items))
    first, left = [], found
    for process in range(processes):  # as `--dist worksteal` does
        share = len(left) // (processes - process)
        first += left[: min(share, 1)]
        left = left[share:]
    assert len(long & set(first)) == min(len(long), processes, len(first))
