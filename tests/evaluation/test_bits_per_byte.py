"""Scores of documents: equal to the plain computation, however documents are grouped or cut."""

import json
import math

import numpy as np
import pytest
import torch

from flash_gsa.data import encode_documents, iter_whole_documents, load_tokenizer, prepare_tokens
from flash_gsa.errors import UsageError
from flash_gsa.evaluation import Score, evaluate_documents
from flash_gsa.models import GSAConfig, GSAForCausalLM

DOCUMENTS = [
    {"text": "def f(x):\n    return x\n", "source": "code"},
    {"text": "Grüße aus Köln. " * 6, "source": "prose"},
    {"text": "x", "source": "code"},
    {"text": "print('hello')\n" * 4, "source": "code"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GSAConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        num_slots=8,
        initializer_range=0.3,
        use_short_conv=True,
    )
    return GSAForCausalLM(config).eval()


def plain_nats(model, tokenizer, text: str) -> float:
    ids = torch.from_numpy(encode_documents(tokenizer, [text])[0].astype("int64"))
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "all.jsonl").write_text("\n".join(json.dumps(d) for d in DOCUMENTS))
    return prepare_tokens(str(folder / "all.jsonl"), tokenizer, cache_dir=folder / "cache")


@pytest.mark.parametrize("tokens_per_pass", [16_384, 64, 17, 1])
def test_equals_one_document_at_a_time_in_one_piece(model, tokenizer, store, tokens_per_pass):
    result = evaluate_documents(model, iter_whole_documents(store, np.arange(4), tokens_per_pass))
    for source in ("code", "prose"):
        texts = [d["text"] for d in DOCUMENTS if d["source"] == source]
        score = result.by_source[source]
        size = sum(len(t.encode()) for t in texts)
        assert score.nats == pytest.approx(sum(plain_nats(model, tokenizer, t) for t in texts), rel=1e-5)
        # Byte tokens: every byte and the end of each document are scored.
        assert (score.bytes, score.tokens, score.documents) == (size, size + len(texts), len(texts))
    assert result.total == sum(result.by_source.values(), Score())


def test_measures():
    score = Score(nats=8 * math.log(2), tokens=4, bytes=16, documents=1)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert score.perplexity == pytest.approx(4)
    assert Score(nats=1e6, tokens=1, bytes=1).perplexity == math.inf


def test_leaves_the_model_in_the_mode_it_was_in(model, store):
    model.train()
    try:
        evaluate_documents(model, iter_whole_documents(store, np.arange(1), 64))
        assert model.training
    finally:
        model.eval()


def test_refuses_no_documents(model):
    with pytest.raises(UsageError, match="no document"):
        evaluate_documents(model, [])
