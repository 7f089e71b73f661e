from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_gsa.data import NOT_SCORED, DocumentBatch, iter_whole_documents
from flash_gsa.errors import UsageError


@given(st.integers(1, 1500), st.permutations(range(60)), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_every_document_whole_in_order_and_every_token_predicted_once(store, max_tokens, documents, count):
    documents = np.array(documents[:count], np.int64)
    tokens = {int(i): [] for i in documents}
    targets = {int(i): [] for i in documents}
    order, num_bytes, state_of = [], 0, None
    for batch in iter_whole_documents(store, documents, max_tokens):
        assert isinstance(batch, DocumentBatch)
        assert 0 < batch.num_tokens <= max_tokens
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        ends = batch.cu_seqlens.tolist()
        assert ends[0] == 0
        assert ends[-1] == batch.num_tokens
        assert len(ends) - 1 == len(batch.documents) == len(batch.labels) == len(batch.num_bytes)
        if batch.continues:
            assert batch.documents.tolist() == [state_of]
        for i, index in enumerate(batch.documents.tolist()):
            tokens[index] += batch.input_ids[0, ends[i] : ends[i + 1]].tolist()
            targets[index] += batch.targets[0, ends[i] : ends[i + 1]].tolist()
            assert batch.labels[i] == store.label(index)
            if not batch.continues:
                order.append(index)
        num_bytes += batch.num_bytes.sum()
        state_of = int(batch.documents[-1])
    assert order == documents.tolist()
    assert num_bytes == store.sizes(documents).sum()
    for index in order:
        text = store.document(index).tolist()
        assert tokens[index] == text
        assert targets[index] == [*text[1:], NOT_SCORED]


def test_batches_are_filled(store):
    batches = list(iter_whole_documents(store, np.arange(60), 1000))
    for batch, following in pairwise(batches):
        assert batch.num_tokens + following.cu_seqlens[1].item() > 1000


def test_device(store):
    batch = next(iter_whole_documents(store, np.arange(3), 1000)).to("meta")
    assert batch.input_ids.device.type == "meta"
    assert batch.labels == ("a", "b", "a")
    assert batch.cu_seqlens.device.type == "cpu"


def test_refuses_no_room(store):
    with pytest.raises(UsageError, match="max_tokens is 0"):
        iter_whole_documents(store, np.arange(3), 0)
