"""Text to documents, documents to tokens, tokens to batches; and synthetic tasks. See docs/data.md."""

from flash_gsa.data.batches import NOT_SCORED, Batch
from flash_gsa.data.encoding import encode_documents
from flash_gsa.data.mqar import MQARBatches, multi_query_associative_recall
from flash_gsa.data.packing import PackedBatches, Part
from flash_gsa.data.preparation import prepare_tokens
from flash_gsa.data.sources import Document, iter_documents
from flash_gsa.data.splits import sample_documents, split_documents
from flash_gsa.data.store import TokenStore
from flash_gsa.data.tokenizers import load_tokenizer
from flash_gsa.data.whole import DocumentBatch, iter_whole_documents

__all__ = [
    "NOT_SCORED",
    "Batch",
    "Document",
    "DocumentBatch",
    "MQARBatches",
    "PackedBatches",
    "Part",
    "TokenStore",
    "encode_documents",
    "iter_documents",
    "iter_whole_documents",
    "load_tokenizer",
    "multi_query_associative_recall",
    "prepare_tokens",
    "sample_documents",
    "split_documents",
]
