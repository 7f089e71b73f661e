"""How well models do: bits per byte of text, yardsticks for it, recall accuracy."""

from flash_gsa.evaluation.bits_per_byte import Evaluation, Score, evaluate_documents
from flash_gsa.evaluation.compression import xz_bits_per_byte
from flash_gsa.evaluation.mqar import mqar_accuracy
from flash_gsa.evaluation.ngram import ByteNGrams

__all__ = [
    "ByteNGrams",
    "Evaluation",
    "Score",
    "evaluate_documents",
    "mqar_accuracy",
    "xz_bits_per_byte",
]
