from types import SimpleNamespace

import pytest
import torch

from flash_gsa.data import Batch
from flash_gsa.evaluation import mqar_accuracy


class Parrot(torch.nn.Module):
    """Says the token it is shown."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(vocabulary, vocabulary, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.vocabulary = vocabulary

    def model(self, input_ids, cu_seqlens=None):
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, self.vocabulary).float())


def test_counts_right_guesses_at_scored_positions_only():
    first = Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-100, 2, 0, 4]]), None)
    second = Batch(torch.tensor([[5, 6]]), torch.tensor([[1, -100]]), None)
    assert mqar_accuracy(Parrot(8), [first, second]) == 2 / 4


def test_refuses_batches_without_queries():
    with pytest.raises(ValueError, match="no position"):
        mqar_accuracy(Parrot(8), [Batch(torch.tensor([[1]]), torch.tensor([[-100]]), None)])
