"""Gated linear attention on a GPU at the sizes and in the formats that models use.

`test_linear.py` runs on a GPU too, with heads of a few numbers. What holds for the kernels that both operators share is
tested in `test_gpu_numerics.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import test_linear as linear
from .helpers import Case, Tensors, rounded
from .judge import CUDA, linear_verdict
from .test_gpu_numerics import (
    ALIKE,
    BF16,
    DTYPES,
    FP32,
    KINDS,
    PACKED,
    assert_same_bits,
    name_of,
    poison_free_memory,
    sizes_up_to,
    strong,
    units_of_strong_gates,
)

pytestmark = pytest.mark.gpu

MODEL = Case(T=300, B=1, K=256, V=512)  # two heads of GLA's 1.3B model
WIDE = Case(T=200, HQ=4, H=2, K=80, V=136)  # no power of two, more than one slice of V


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in rounded(linear.make(case, seed), dtype).items()}


def run(backend: str, x: Tensors, case: Case) -> Tensors:
    return {name: y.to(CUDA) for name, y in linear.run(backend, x, case, CUDA).items()}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for dtype in DTYPES for case in (MODEL, WIDE)),
        (Case(T=300, B=1, HQ=4, H=2, K=256, V=512, scale=0.0625), BF16),
        (Case(T=200, B=1, K=256, V=16, state=False), BF16),
        (Case(lengths=PACKED, HQ=4, H=2, K=80, V=136), BF16),
    ],
    ids=name_of,
)
def test_as_near_to_float64_as_plain_pytorch(gpu_backend, case, dtype):
    x = inputs(case, dtype)
    linear_verdict(run(gpu_backend, x, case), x, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_strong_gates(gpu_backend, kind, dtype):
    x = inputs(MODEL, dtype)
    x["g"] = strong(kind, x["g"].cpu()).to(CUDA)
    units = units_of_strong_gates(gpu_backend, dtype)
    linear_verdict(run(gpu_backend, x, MODEL), x, MODEL, units=units, alike=kind in ALIKE)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("case", [WIDE, Case(lengths=PACKED, HQ=4, H=2, K=80, V=136)], ids=name_of)
@pytest.mark.parametrize("kind", ["gentle", "strong"])
def test_memory_that_was_used_before_is_never_read(gpu_backend, case, dtype, kind):
    x = inputs(case, dtype)
    if kind == "strong":
        x["g"][:, 40], x["g"][:, 100, :, ::2] = -1e30, -70.0
    clean = run(gpu_backend, x, case)
    poison_free_memory()
    assert_same_bits(run(gpu_backend, x, case), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_sizes_packing_and_gates(gpu_backend, dtype):
    linear.call(gpu_backend, inputs(WIDE, dtype), WIDE)  # skips where it cannot

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def judged(data):
        case, x = linear.any_problem(data, 150, sizes_up_to(256), sizes_up_to(512))
        x = {name: tensor.to(CUDA) for name, tensor in rounded(x, dtype).items()}
        linear_verdict(run(gpu_backend, x, case), x, case, units=units_of_strong_gates(gpu_backend, dtype))

    judged()
