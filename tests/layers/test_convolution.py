"""The short convolution is nn.Conv1d with zeros before each sequence."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash_gsa.layers import ShortConvolution
from flash_gsa.layers.convolution import positions

D = 5


def pair(width: int) -> tuple[ShortConvolution, nn.Conv1d]:
    ours, theirs = ShortConvolution(D, width), nn.Conv1d(D, D, width, groups=D, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2, 3, 20])
def test_is_a_causal_depthwise_convolution(width, T):
    ours, theirs = pair(width)
    x = torch.randn(2, T, D)
    y, tail = ours(x)
    before = F.pad(x, (0, 0, width - 1, 0))
    torch.testing.assert_close(y, F.silu(theirs(before.transpose(1, 2)).transpose(1, 2)))
    assert torch.equal(tail, before[:, -(width - 1) :])


@pytest.mark.parametrize("bounds", [(0, 1, 2, 3, 20), (0, 5, 20), (0, 20)])
def test_pieces_through_the_tail_are_one_pass(bounds):
    convolution, x, tail, pieces = ShortConvolution(D, 4), torch.randn(2, 20, D), None, []
    for a, b in pairwise(bounds):
        y, tail = convolution(x[:, a:b], tail=tail)
        assert tail.shape == (2, 3, D)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), convolution(x)[0])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_is_a_loop_over_sequences(kind):
    convolution, x = ShortConvolution(D, 4), torch.randn(1, 20, D)
    bounds = [0, 0, 1, 3, 3, 10, 20, 20]
    packed, _ = convolution(x, cu_seqlens=torch.tensor(bounds, dtype=kind))
    for a, b in pairwise(bounds):
        torch.testing.assert_close(packed[:, a:b], convolution(x[:, a:b])[0])


def test_positions_restart_with_every_sequence():
    found = positions(torch.tensor([0, 0, 2, 3, 3, 6]), 6, torch.device("cpu"))
    assert found.tolist() == [0, 1, 0, 0, 1, 2]


def test_the_future_is_not_seen():
    convolution, x = ShortConvolution(D, 4), torch.randn(1, 10, D)
    changed = x.clone()
    changed[:, 6:] = 9.0
    assert torch.equal(convolution(x)[0][:, :6], convolution(changed)[0][:, :6])
