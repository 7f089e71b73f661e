"""Blocks: their equation, and that maps which are computed together are still the modules they seem to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash_gsa.layers.linears import is_product, projections

MAPS = ("attn.q_proj", "attn.f_proj", "attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def test_a_block_is_its_equation(tiny):
    block = tiny(num_hidden_layers=1, num_heads=2).double().model.layers[0]
    x = torch.randn(2, 20, block.mlp.gate_proj.in_features, dtype=torch.float64)
    norms = [F.rms_norm, x.shape[-1:]]
    h = x + block.attn(norms[0](x, norms[1], block.attn_norm.weight, block.attn_norm.eps))
    y = norms[0](h, norms[1], block.mlp_norm.weight, block.mlp_norm.eps)
    gate, up, down = (getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    torch.testing.assert_close(block(x), h + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T)


@pytest.mark.parametrize("name", [*MAPS, "attn.g_norm"])
def test_hooks_are_called(tiny, name):
    block = tiny(num_hidden_layers=1, num_heads=2).model.layers[0]
    x = torch.randn(2, 5, block.mlp.gate_proj.in_features)
    want, seen = block(x), []
    handle = block.get_submodule(name).register_forward_hook(lambda module, inputs, y: seen.append(y))
    assert torch.equal(block(x), want)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(block(x), want)
    assert len(seen) == 1


@pytest.mark.parametrize("name", MAPS)
def test_another_module_in_a_map_s_place_is_called(tiny, name):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block = tiny(num_hidden_layers=1, num_heads=2).model.layers[0]
    x = torch.randn(2, 5, block.mlp.gate_proj.in_features)
    before, linear = block(x), block.get_submodule(name)
    linear.__class__ = Adapted
    assert not torch.allclose(block(x), before)


def test_maps_with_a_bias_keep_it():
    maps = nn.Linear(8, 5), nn.Linear(8, 3, bias=False)
    x = torch.randn(4, 8)
    assert [is_product(linear) for linear in maps] == [False, True]
    for found, linear in zip(projections(x, *maps), maps, strict=True):
        assert torch.equal(found, linear(x))
