"""`flash-gsa train --dry-run`: a table, and an exit status that says whether the run fits."""

import pytest

from flash_gsa.cli.dry_run import memory_bytes
from flash_gsa.errors import UsageError

SMALL = ["prose_15m", "model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=128"]


def test_it_prints_without_data_and_without_judging(run):
    status, out, _ = run("train", *SMALL, "schedule={tokens: 1_638_400, warmup_steps: 10}", "--dry-run")
    assert status == 0
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "100" in lines["steps"]
    assert "10 of them warm-up" in lines["steps"]
    assert "1,638,400" in lines["tokens"]
    assert "32,000" in lines["vocabulary"]
    assert "no GPU here and no --device-memory" in lines["together"]


def test_it_refuses_what_does_not_fit(run):
    status, out, err = run("train", *SMALL, "--dry-run", "--device-memory", "1.3GiB")
    assert status == 2
    assert "of 1.3 GiB" in out
    assert "The smallest change that fits: batch.micro_rows=" in err
    status, *_ = run("train", *SMALL, "--dry-run", "--device-memory", "80GiB")
    assert status == 0


def test_it_refuses_a_wrong_number_of_processes(run):
    status, _, err = run("train", "gsa_340m", "--dry-run", "--processes", "7")
    assert status == 2
    assert "The nearest that can: batch.rows=280, or 8 processes" in err


def test_more_processes_than_rows_and_stretches_that_are_unequal(run):
    _, _, err = run("train", "gsa_1.3b", "--dry-run", "--processes", "300")
    assert "or 32 processes, or 256 processes with batch.micro_rows=1" in err
    unequal = ["gsa_340m", "engine={kind: fsdp2, context: 3}", "--dry-run", "--processes", "6"]
    _, _, err = run("train", *unequal, "batch.rows=144")
    assert "Set engine.context=2 or batch.length=2049" in err
    _, _, err = run("train", *unequal)  # 128 rows, which three groups of two cannot divide
    assert "Set batch.length=2049" in err


def test_an_engine_of_several_processes_on_one_says_how_there_are_more(run):
    small = ["model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=128"]
    _, out, _ = run("train", "gsa_340m", *small, "engine={kind: fsdp2}", "--dry-run")
    assert "a launcher starts its processes (torchrun --nproc-per-node N …); --processes N counts for N" in out
    for more in (["engine={kind: single}"], ["engine={kind: fsdp2}", "--processes", "2"]):
        _, out, _ = run("train", "gsa_340m", *small, *more, "--dry-run")
        assert "launcher" not in out


def test_its_options_are_refused_without_it(run):
    status, _, err = run("train", "gsa_340m", "--processes", "8")
    assert status == 2
    assert "go with --dry-run" in err


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("0.5tib", 2**39)])
def test_sizes_are_read(text, size):
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GiB", "80 bananas"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="for instance 80GiB"):
        memory_bytes(text)
