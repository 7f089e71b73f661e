"""Products in one number format whose results are wanted in another."""

import pytest
import torch

from flash_gsa.ops.products import add_product, as_autocast, product, product_dtype, sums_in_fp32

HALVES = [torch.bfloat16, torch.float16]


def test_the_dtype_of_a_product_is_autocasts_where_that_is_on():
    x, double = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.half()) == torch.bfloat16
        assert product_dtype(double) == torch.float64  # as autocast has it
        assert torch.mm(double[None], double[:, None]).dtype == torch.float64
        assert [y.dtype for y in as_autocast(x, double)] == [torch.bfloat16, torch.float64]
        with torch.autocast("cpu", enabled=False):
            assert product_dtype(x) == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_and_sums_of_products(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a, b = (torch.randn(300, n, device=device).to(dtype) for n in (1001, 64))
    total = torch.full((1001, 64), float("nan"), device=device)
    want = a.t().double() @ b.double()
    wide = sums_in_fp32(torch.device(device, 0 if device == "cuda" else None), dtype)
    allowed = {"rtol": 1e-5, "atol": 1e-3} if wide else {"rtol": torch.finfo(dtype).eps, "atol": 0.3}
    for times in (1, 2, 3):
        add_product(total, a.t(), b, times == 1)
        torch.testing.assert_close(total.double(), times * want, **allowed)
    found = product(a.t(), b, torch.float32)
    torch.testing.assert_close(found.double(), want, **allowed)
    same = product(a.t(), b, dtype)
    assert (found.dtype, same.dtype) == (torch.float32, dtype)
    assert torch.equal(same, a.t() @ b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_a_gpu_does_not_round_what_is_wanted_in_float32(dtype):
    """Where PyTorch has such products: without them results are right, and slower."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert sums_in_fp32(torch.device("cuda", 0), dtype)
