"""The norm after SiLU is SiLU, then the norm."""

import pytest
import torch
import torch.nn.functional as F

from flash_gsa.layers.norm import RMSNorm, SiluRMSNorm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_silu_norm_is_its_two_parts(affine, dtype):
    parts, together = RMSNorm(24, eps=1e-3, elementwise_affine=affine), SiluRMSNorm(24, 1e-3, affine)
    if affine:
        torch.nn.init.normal_(parts.weight)
    together.load_state_dict(parts.state_dict())
    x = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    found, want = together(x), parts(F.silu(x))
    assert found.dtype == dtype  # also where the weight has another
    torch.testing.assert_close(found, want)
    gradients = [
        torch.autograd.grad(y.square().sum(), [x, *norm.parameters()]) for y, norm in ((found, together), (want, parts))
    ]
    torch.testing.assert_close(*gradients)


def test_it_is_its_equation():
    norm, x = SiluRMSNorm(24, 1e-3), torch.randn(7, 24, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    a = x / (1 + torch.exp(-x))
    want = a / (a.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm.double()(x), want)
