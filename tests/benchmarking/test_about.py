import subprocess

import pytest

from flash_gsa import __version__
from flash_gsa.benchmarking import about
from flash_gsa.errors import UsageError
from flash_gsa.training import starts


def test_a_copy_without_git_takes_the_commit_it_is_told(monkeypatch):
    monkeypatch.setattr(about, "commit", lambda: None)
    assert about.about("x", "cpu")["commit"] is None
    record = about.about("x", "cpu", "abc123")
    assert (record["commit"], record["command"]) == ("abc123", "x")
    # Of the running code, not of what may be installed beside it.
    assert record["versions"]["flash-gsa"] == __version__


def test_a_clean_checkout_is_not_told_otherwise(monkeypatch):
    monkeypatch.setattr(about, "commit", lambda: "0123456789ab")
    assert about.about("x", "cpu", "0123456")["commit"] == "0123456789ab"
    with pytest.raises(UsageError, match="the code is at commit 0123456789ab, not at 'abc'"):
        about.about("x", "cpu", "abc")


def test_a_copy_over_another_checkout_says_both(monkeypatch):
    monkeypatch.setattr(about, "commit", lambda: "0123456789ab-dirty")
    assert about.about("x", "cpu", "0123456")["commit"] == "0123456789ab-dirty"
    record = about.about("x", "cpu", "abc")
    assert (record["commit"], record["checkout"]) == ("abc", "0123456789ab-dirty")


def test_a_run_in_a_copy_without_git_takes_the_commit_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(about, "commit", lambda: None)
    monkeypatch.setenv(starts.COMMIT, "abc123")
    starts.record_start(tmp_path, resume_step=None, device="cpu", engine="cpu, fp32")
    assert starts.read_starts(tmp_path)[0]["commit"] == "abc123"


def test_an_installation_inside_another_checkout_has_no_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    inside = tmp_path / "venv" / "flash_gsa" / "benchmarking"
    inside.mkdir(parents=True)
    monkeypatch.setattr(about, "__file__", str(inside / "about.py"))
    assert about.commit() is None
