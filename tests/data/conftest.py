"""A small corpus with two sources, and its token store."""

import json
from pathlib import Path

import numpy as np
import pytest

from flash_gsa.data import TokenStore, load_tokenizer, prepare_tokens


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """60 documents of 1 … 200 characters, no two alike, alternating between sources "a" and "b"."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i in range(60):
            text = f"{i} " + "".join(rng.choice(list("abc é漢"), size=rng.integers(1, 200)))
            out.write(json.dumps({"text": text, "source": "ab"[i % 2]}) + "\n")
    return file


@pytest.fixture(scope="session")
def store(corpus, byte_tokenizer, tmp_path_factory) -> TokenStore:
    return prepare_tokens(str(corpus), byte_tokenizer, cache_dir=tmp_path_factory.mktemp("cache"))
