"""A tiny model of text in a folder, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from flash_gsa.cli import main


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Answer]:
    """`run("eval", checkpoint, file)` → exit status, stdout, stderr."""

    def call(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Answer(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model with byte tokens: 2 GSA layers of 2 heads with 8 slots."""
    from flash_gsa.data import load_tokenizer
    from flash_gsa.models import GSAConfig, GSAForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer("byte")
    config = GSAConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8, initializer_range=0.3
    )
    folder = tmp_path_factory.mktemp("model")
    GSAForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stdin(monkeypatch) -> Callable[[bytes], None]:
    """`stdin(b"…")` makes that what comes in on stdin."""

    def feed(content: bytes) -> None:
        import io

        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))

    return feed
