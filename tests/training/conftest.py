"""A recipe small enough to train in a test: a byte-level model of a few sentences."""

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
batch: {{rows: 2, length: 32, accumulation: 2}}
schedule: {{steps: 12, warmup_steps: 2}}
optimizer: {{lr: 1e-2, min_lr: 1e-3}}
evaluation: {{every: 5}}
checkpoints: {{every: 4}}
logging: {{tensorboard: false}}
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


@pytest.fixture
def make_recipe(tmp_path):
    """`make_recipe("optimizer.lr=1", …)`: the tiny recipe with overrides, its data in tmp_path."""
    import json

    import numpy as np

    rng = np.random.default_rng(0)
    # About 900 bytes of training text: an epoch is some 7 steps of 128 tokens, so the tests cross epochs.
    with (tmp_path / "text.jsonl").open("w") as lines:
        for i in range(24):
            text = " ".join(rng.choice(WORDS, size=rng.integers(3, 20)))
            lines.write(json.dumps({"text": text, "source": "odd" if i % 2 else "even"}) + "\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(folder=tmp_path))

    def make(*overrides):
        return load_recipe(tmp_path / "tiny.yaml", overrides)

    return make
