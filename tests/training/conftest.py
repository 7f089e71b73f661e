"""A recipe small enough to train in a test: a byte-level model of a few sentences."""

import json

import numpy as np
import pytest
import torch

from flash_gsa.training.recipe_file import load_recipe

WORDS = [
    "the",
    "a",
    "slot",
    "gate",
    "reads",
    "writes",
    "key",
    "value",
    "and",
    "then",
    "forgets",
    "remembers",
    "it",
    "all",
    "again",
    "once",
    "more",
]

RECIPE = """
name: tiny
description: for tests
tokenizer: byte
model: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_heads: 2, num_slots: 4}}
data: {{kind: text, source: {folder}/text.jsonl, held_out: 400, cache_dir: {folder}/cache}}
batch: {{rows: 4, length: 32, micro_rows: 2}}
schedule: {{steps: 12, warmup_steps: 2}}
optimizer: {{lr: 1e-2, min_lr: 1e-3}}
evaluation: {{every: 5}}
checkpoints: {{every: 4}}
logging: {{trackers: []}}
device: cpu
output_dir: {folder}/run
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Tests share the machine, and tiny products are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Its pictures take longer than these runs; one test makes it."""
    if "with_report" not in request.keywords:
        monkeypatch.setattr("flash_gsa.training.trainer.write_report", lambda run_dir: run_dir / "report.html")


@pytest.fixture
def make_recipe(tmp_path):
    """`make_recipe("optimizer.lr=1", …)`: the tiny recipe with overrides, its data in tmp_path."""
    return write_tiny(tmp_path)


def write_tiny(folder):
    """Writes tiny.yaml and its text; returns what loads it with overrides."""
    rng = np.random.default_rng(0)
    # About 900 bytes of training text: an epoch is some 7 steps of 128 tokens, so the tests cross epochs.
    with (folder / "text.jsonl").open("w") as lines:
        for i in range(24):
            text = " ".join(rng.choice(WORDS, size=rng.integers(3, 20)))
            lines.write(json.dumps({"text": text, "source": "odd" if i % 2 else "even"}) + "\n")
    (folder / "tiny.yaml").write_text(RECIPE.format(folder=folder))
    return lambda *overrides: load_recipe(folder / "tiny.yaml", overrides)
