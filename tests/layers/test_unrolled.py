"""What the GPU tests hold mixers against can be called as the mixers call it, and is what they compute."""

import pytest
import torch

from .test_gpu import MIXERS, D, mixed, mixer_of

RECURRENT = [name for name in MIXERS if hasattr(MIXERS[name](), "sequences")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_mixers_are_their_operators_unrolled(name, packed):
    x = torch.randn(1, 40, D)
    options = {"cu_seqlens": torch.tensor([0, 13, 40])} if packed else {}
    found, wanted = (
        mixed(mixer_of(name, torch.float32, "cpu", torch.float32, unrolled=unrolled), x, **options)
        for unrolled in (False, True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
