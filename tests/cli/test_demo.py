"""The demo from one end to the other, in miniature; and training by recipe."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

from flash_gsa.cli.demo import _texts_seen
from flash_gsa.cli.train import exit_if_stopped

TINY = (
    "schedule.minutes=null",
    "schedule.steps=3",
    "schedule.warmup_steps=1",
    "batch.rows=2",
    "batch.length=64",
    "tokenizer=byte",
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.num_heads=2",
    "model.num_slots=4",
    "data.held_out=2000",
    "evaluation.max_bytes=500",
    "logging.trackers=[]",
)


@pytest.fixture
def source(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["def", "return", "value", "näme", "(x)", "if"]
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)) + "\n", "utf-8")
    return [f"data.source={texts}", f"data.cache_dir={tmp_path / 'cache'}"]


def test_demo_measures_writes_and_draws(run, source, tmp_path):
    out = tmp_path / "run"
    answer = run("demo", *TINY, *source, "--out", out)
    assert answer.status == 0, answer.err
    report = json.loads((out / "result.json").read_text("utf-8"))
    bits = report["bits_per_byte"]
    assert all(0 < bits[f"order_{order}"] < 8 for order in range(6))
    assert 4 < bits["model"] < 16
    assert bits["xz"] > 0
    # Three steps of two rows of 64 tokens; begin and end tokens are no bytes, and rows may cut the two of an ä.
    assert 3 * 2 * 64 - 16 <= report["training_bytes"] <= 3 * 2 * 64
    assert report["sample"]["passage"]
    for path in report["paths"].values():
        assert Path(path).exists()
        assert path in answer.out
    for shown in (bits["model"], bits["order_2"], bits["xz"]):
        assert f"{shown:.3f}" in answer.out

    again = run("demo", *TINY, *source, "--out", out)
    assert again.status == 0
    assert "holds a finished demo: showing it again" in again.out
    assert json.loads((out / "result.json").read_text("utf-8"))["bits_per_byte"] == bits

    other = run("demo", *TINY, *source, "model.num_slots=8", "--out", out)
    assert other.status == 2
    assert "model.num_slots" in other.err
    fresh = run("demo", *TINY, *source, "model.num_slots=8", "--out", out, "--fresh")
    assert fresh.status == 0
    assert "showing it again" not in fresh.out


def test_demo_refuses_what_is_no_text(run):
    task = "data={kind: mqar, num_kv_pairs: 2, vocab_size: 64}"
    answer = run("demo", task, "tokenizer=null", "evaluation.max_bytes=null")
    assert answer.status == 2
    assert "the demo is about text" in answer.err


def test_a_run_that_a_signal_stopped_ends_with_its_status():
    for name, status in (("SIGINT", 130), ("SIGTERM", 143)):
        with pytest.raises(typer.Exit) as ended:
            exit_if_stopped(SimpleNamespace(signal=name))
        assert ended.value.exit_code == status
    exit_if_stopped(SimpleNamespace(signal=None))


class Stream:
    """Documents of lengths 3, 5 and 4 (with begin and end), over and over, in batches of 2 tokens."""

    rows, length, epoch_tokens = 1, 2, 12

    def batch(self, index):
        import torch

        from flash_gsa.data import Batch

        tokens = [256, 97, 257, 256, 98, 99, 100, 257, 256, 101, 102, 257] * 3
        ids = torch.tensor([tokens[2 * index : 2 * index + 2]])
        begins = [i for i in (1,) if ids[0, i] == 256]
        return Batch(ids, ids, torch.tensor([0, *begins, 2], dtype=torch.int32))


@pytest.mark.parametrize(
    ("batches", "expected"), [(0, []), (3, [b"a", b"bc"]), (6, [b"a", b"bcd", b"ef"]), (9, [b"a", b"bcd", b"ef"])]
)
def test_texts_seen_are_those_of_the_batches_each_once(batches, expected):
    from flash_gsa.data import load_tokenizer

    assert list(_texts_seen(Stream(), batches, load_tokenizer("byte"))) == expected


def test_train_runs_a_recipe_and_says_where_things_are(run, source, tmp_path):
    out = tmp_path / "run"
    answer = run("train", "demo", *TINY, *source, f"output_dir={out}")
    assert answer.status == 0, answer.err
    assert str(out / "checkpoints" / "step-00000003") in answer.out
    assert (out / "loss.png").exists()
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedle.steps=3", "Did you mean 'schedule'?"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("nonsense", "key.path=value"),
    ],
)
def test_train_refuses_wrong_overrides(run, override, message):
    answer = run("train", "demo", override)
    assert answer.status == 2
    assert message in answer.err
