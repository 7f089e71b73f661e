"""Gated linear attention on a GPU at the sizes and in the formats that models use.

`test_linear.py` runs on a GPU too, with heads of a few numbers. What holds for the kernels that both operators share is
tested in `test_gpu_numerics.py`.
"""

from itertools import accumulate, pairwise

import pytest
import torch

from . import test_linear as linear
from .helpers import Case, Tensors, rounded
from .judge import CUDA, linear_verdict
from .test_gpu_numerics import (
    ALIKE,
    BF16,
    DTYPES,
    FP32,
    HALVES,
    KINDS,
    OFFSETS,
    PACKED,
    SEEDS,
    any_calls,
    assert_near,
    assert_prefixes_stay,
    assert_same_bits,
    assert_same_on_another_stream,
    name_of,
    poison_free_memory,
    stretched,
    strong,
    units_of_strong_gates,
)

pytestmark = pytest.mark.gpu

MODEL = Case(T=300, B=1, K=256, V=512)  # two heads of GLA's 1.3B model
WIDE = Case(T=200, HQ=4, H=2, K=80, V=136)  # no power of two, more than one slice of V


def inputs(case: Case, dtype: torch.dtype, seed: int = 0, one_gate: bool = False) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in rounded(linear.make(case, seed, one_gate), dtype).items()}


def with_gradients(function, x: Tensors) -> Tensors:
    """`linear.with_gradients`, which leaves its results on the CPU, for results on the GPU."""
    return {name: y.to(CUDA) for name, y in linear.with_gradients(function, x).items()}


def run(backend: str, x: Tensors, case: Case) -> Tensors:
    return with_gradients(lambda z: linear.call(backend, z, case), x)


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


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [WIDE, MODEL], ids=name_of)
@pytest.mark.parametrize("before", ["gentle", "single strong gates"])
def test_a_prefix_does_not_depend_on_what_follows_by_a_bit(gpu_backend, case, dtype, before):
    x, other = inputs(case, dtype), inputs(case, dtype, seed=1)
    if before != "gentle":
        x["g"][:, 20:22, :, 0], x["g"][:, 90] = -70.0, -1e5
    assert_prefixes_stay(lambda z: linear.call(gpu_backend, z, case)[0], x, other, OFFSETS)


MODEL_PACKED = Case(lengths=PACKED, K=256, V=512)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [WIDE, MODEL, MODEL_PACKED], ids=name_of)
def test_two_runs_and_a_run_on_another_stream_give_the_same_bits(gpu_backend, case, dtype):
    x = inputs(case, dtype)
    x["g"][:, 40] = -1e6
    assert_same_on_another_stream(lambda: run(gpu_backend, x, case))


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [Case(lengths=PACKED, HQ=4, H=2, K=80, V=136), MODEL_PACKED], ids=name_of)
def test_packed_is_a_loop_over_sequences(gpu_backend, case, dtype):
    x = inputs(case, dtype)

    def loop(z):
        results = []
        for n, (start, end) in enumerate(pairwise([0, *accumulate(case.lengths)])):
            one = {name: z[name][:, start:end] for name in "qkvg"} | {"state": z["state"][n : n + 1]}
            results.append(linear.call(gpu_backend, one, Case(T=end - start, B=1)))
        o, final = zip(*results, strict=True)
        return torch.cat(o, dim=1), torch.cat(final)

    assert_near(run(gpu_backend, x, case), with_gradients(loop, x), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize(
    ("case", "bounds"),
    [
        *((WIDE, bounds) for bounds in ((0, 1, 200), (0, 64, 128, 200), (0, 37, 101, 102, 200))),
        *((MODEL, bounds) for bounds in ((0, 128, 300), (0, 37, 165, 166, 300))),
    ],
    ids=name_of,
)
def test_pieces_carried_through_the_state_are_one_pass(gpu_backend, case, bounds, dtype):
    x = inputs(case, dtype)
    x["g"][:, 70, :, 3] = -200.0

    def in_pieces(z):
        outputs, state = [], z["state"]
        for start, end in pairwise(bounds):
            piece = {name: z[name][:, start:end] for name in "qkvg"} | {"state": state}
            o, state = linear.call(gpu_backend, piece, Case(T=end - start))
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    units = units_of_strong_gates(gpu_backend, dtype)
    linear_verdict(with_gradients(in_pieces, x), x, case, units=units)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_sizes_packing_and_gates(gpu_backend, seed, dtype):
    for n, case in enumerate(any_calls(seed, dtype, linear=True)):
        x = inputs(case, dtype, seed=n, one_gate=n == 3)
        x["g"] = stretched(x["g"], seed=10 * seed + n)
        try:
            linear_verdict(run(gpu_backend, x, case), x, case, units=units_of_strong_gates(gpu_backend, dtype))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
