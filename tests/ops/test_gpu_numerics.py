"""The GPU backends at the sizes and in the formats that models use: accuracy, and what must hold bit for bit.

`test_accuracy.py`, `test_invariants.py` and `test_strong_gates.py` run on a GPU too, in float32 and with heads of a few
numbers. Here heads are wider than one tile, and formats are those of training. Every combination of sizes, format and
options compiles kernels of its own, so most tests share WIDE.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_gsa import abc_gates, gated_slot_attention
from flash_gsa.ops import Problem, explain

from .helpers import EPS, Case, Tensors, call, make, rounded, skip_unless_able, trained, with_gradients
from .judge import CUDA, distance, o_alone, truth, verdict

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
BF16, FP32 = torch.bfloat16, torch.float32

WIDE = Case(T=200, HQ=4, H=2, K=80, V=136, M=33)  # no power of two, more than one slice of K and of V
MODEL_1B = Case(T=300, B=1, K=512, V=512, M=64)
MODEL_7B = Case(T=200, B=1, HQ=8, H=2, K=128, V=128, M=64)
SHORT = tuple(17 * n % 41 for n in range(2000))  # 0 to 40 tokens


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in rounded(make(case, seed), dtype).items()}


def run(backend: str, x: Tensors, case: Case) -> Tensors:
    return with_gradients(lambda z: call(backend, z, case), x)


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert torch.equal(found[name], want), name


def assert_near(found: Tensors, wanted: Tensors, dtype: torch.dtype) -> None:
    """The same numbers, but for sums in another order, which round a few of them to a neighbour."""
    limit = 64 * EPS if dtype == FP32 else torch.finfo(dtype).eps / 4
    for name, want in wanted.items():
        assert distance(found[name], want) <= limit, name


def narrow(T: int) -> Case:
    return Case(T=T, B=4, HQ=4, H=2, K=64, V=64, M=32)


def slots(M: int) -> Case:
    return Case(T=130, B=1, HQ=1, H=1, K=64, V=64, M=M)


PACKED = (0, 17, 64, 1, 0, 130, 5, 0)
WIDEST = Case(T=200, B=1, HQ=2, H=1, K=512, V=512, M=256)
ACCURACY = [
    *((case, dtype) for dtype in DTYPES for case in (MODEL_1B, MODEL_7B, WIDE)),
    (Case(T=300, B=1, K=256, V=256, M=64, state=False), BF16),
    (Case(T=200, HQ=4, H=2, K=80, V=136, M=33, strength=True, scale=0.35), BF16),
    (Case(lengths=PACKED, HQ=8, H=2, K=128, V=128, M=64), BF16),
    (Case(lengths=PACKED, HQ=8, H=2, K=128, V=128, M=64, strength=True), BF16),
    (Case(lengths=PACKED, HQ=4, H=2, K=80, V=136, M=33), FP32),
    *((Case(lengths=SHORT, HQ=2, H=1, K=32, V=32, M=16), dtype) for dtype in (BF16, FP32)),
    *((slots(M), BF16) for M in (1, 16, 64, 100, 128, 256)),
    *((slots(M), FP32) for M in (1, 100, 256)),
    *((narrow(T), dtype) for dtype in (BF16, FP32) for T in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129)),
    (Case(T=1000, B=1, HQ=4, H=2, K=64, V=64, M=32), BF16),
    # Corners of what the kernels take: heads and slots at their limits, and one kind of head without the other.
    *((WIDEST, dtype) for dtype in DTYPES if dtype != FP32),
    (replace(WIDEST, scale=0.05), FP32),
    *((Case(T=200, B=1, HQ=1, H=1, K=K, V=V, M=256), BF16) for K, V in ((512, 16), (16, 512))),
]


def name_of(value) -> str | None:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Case) and value.lengths == SHORT:
        return "2000-short-sequences"
    return str(value) if isinstance(value, Case) else None


def test_triton_runs_plain_bfloat16_and_is_the_first_choice():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reasons = explain(Problem(B=8, T=2048, HQ=4, H=4, K=512, V=512, M=64, dtype=BF16, device="cuda"))
    assert dict(reasons)["triton"] is None
    assert next(name for name, reason in reasons if reason is None) == "triton"


@pytest.mark.parametrize(("case", "dtype"), ACCURACY, ids=name_of)
def test_as_near_to_float64_as_plain_pytorch(gpu_backend, case, dtype):
    x = inputs(case, dtype)
    verdict(run(gpu_backend, x, case), x, case)


def test_logits_that_pass_on_every_digit(gpu_backend, request):
    """float32, scale 1, keys of 512 random numbers: of what a softmax of such logits gives the last digits count."""
    if gpu_backend == "chunk":
        reason = "cuBLAS sums 512 products one after the other: 6 times plain PyTorch, see log.md"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    x = inputs(WIDEST, FP32)
    verdict(run(gpu_backend, x, WIDEST), x, WIDEST)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", [Case(T=300, B=1, K=256, V=256, M=64, state=False)], ids=name_of)
def test_the_training_call_without_any_state(gpu_backend, case, dtype):
    x = inputs(case, dtype)
    skip_unless_able(gpu_backend, x, case)

    def train(z):
        o, state = gated_slot_attention(z["q"], z["k"], z["v"], z["g"], backend=gpu_backend)
        assert state is None
        return o_alone(o)

    verdict(with_gradients(train, x), x, case, final=False)


@pytest.mark.parametrize("gates", ["all forget", "one slot keeps"])
def test_long_segments_of_which_little_is_left(gates, gpu_backend, monkeypatch):
    """`states_forward` alone over a segment begins where the rest is forgotten, `states_backward` ends there."""
    if gpu_backend == "triton":
        from flash_gsa.ops.triton import plan

        monkeypatch.setattr(plan, "FILLING", 4)  # segments of many chunks without a sequence of 100,000 tokens
    case = Case(T=2500, B=1, HQ=1, H=1, K=32, V=32, M=16)
    x = inputs(case, BF16)
    x["g"] = torch.full_like(x["g"], -0.5)
    if gates == "one slot keeps":
        x["g"][..., 1] = -1e-4
    verdict(run(gpu_backend, x, case), x, case)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_gates_and_strengths_in_16_bits(gpu_backend, dtype):
    case = Case(T=200, HQ=4, H=2, K=80, V=136, M=33, strength=True)
    x = {name: y.to(dtype) if name in "qkvgs" else y for name, y in inputs(case, dtype).items()}
    result = run(gpu_backend, x, case)
    assert result["dg"].dtype == result["ds"].dtype == dtype
    verdict(result, x, case)


STRENGTHS = torch.tensor([-1e-4, -0.05, -1.0, -3.0, -8.0, -30.0, -120.0, -1e4, -1e30, float("-inf")])


def any_of_them(*shape: int) -> Tensor:
    return STRENGTHS[torch.randint(len(STRENGTHS), shape, generator=torch.Generator().manual_seed(7))]


def strong(kind: str, g: Tensor) -> Tensor:
    """Gates g [B, T, H, M] made strong in the way called `kind`."""
    g = g.clone()
    B, T, H, M = g.shape
    if kind == "anything":
        g = any_of_them(B, T, H, M)
    elif kind == "a value a token":
        g = any_of_them(B, T, H, 1).expand_as(g)
    elif kind == "a value a slot":
        g = any_of_them(B, 1, H, M).expand_as(g)
    elif kind == "single tokens":
        for t, value in ((3, -30.0), (50, -1e4), (64, -1e30), (127, -120.0), (150, float("-inf")), (199, -1e30)):
            g[:, t] = value
        g[:, 20, :, 5], g[:, 100, :, ::2] = -1e30, -70.0
    elif kind == "every slot at -1":
        g[:] = -1.0
    elif kind == "half of the slots at -3":
        g[..., ::2] = -3.0
    elif kind == "half of the slots near -3":
        g[..., ::2] = -3.0 - 0.3 * torch.rand(g[..., ::2].shape)
    elif kind == "almost nothing forgotten":
        g[:] = -1e-4
    return g.contiguous()


KINDS = [
    "anything",
    "a value a token",
    "a value a slot",
    "single tokens",
    "every slot at -1",
    "half of the slots at -3",
    "half of the slots near -3",
    "almost nothing forgotten",
]


ALIKE = ("every slot at -1", "half of the slots at -3")


def units_of_strong_gates(gpu_backend: str, dtype: torch.dtype, M: int = 0) -> int:
    """A sum of gates near -60, rounded to float32, moves its exponential by 60 half units; a product takes two of them.
    The kernels' sums for float32 inputs are float64, and are rounded after the exponential.

    Where gates erase everything all slots are alike: a sum over M of one number in M places, one after the other, has
    roundings that all go one way. cuBLAS adds in several stretches."""
    return max(8, M // 8) if (gpu_backend, dtype) == ("triton", FP32) else 8 + 60


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_strong_gates(gpu_backend, kind, dtype):
    x = inputs(WIDE, dtype)
    x["g"] = strong(kind, x["g"].cpu()).to(CUDA)
    units = units_of_strong_gates(gpu_backend, dtype, WIDE.M)
    verdict(run(gpu_backend, x, WIDE), x, WIDE, units=units, alike=kind in ALIKE)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [WIDE, replace(WIDE, strength=True), MODEL_1B, MODEL_7B], ids=name_of)
@pytest.mark.parametrize("value", [0.0, -1e30, float("-inf")])
def test_all_is_kept_or_all_is_forgotten(gpu_backend, value, case, dtype):
    """With gates of 0 nothing is written either, but where there are strengths."""
    x = inputs(case, dtype)
    x["g"].fill_(value)
    units, adds_up = units_of_strong_gates(gpu_backend, dtype, case.M), value == 0 and case.strength
    verdict(run(gpu_backend, x, case), x, case, units=units, add_up=adds_up)


def is_clear(x: Tensors, case: Case) -> Tensor:
    """[B, T, HQ]: where the highest score is above the others by more than what rounding moves, and by more than 200,
    so that the softmax is 1 at one slot and 0 at all others in any format."""
    x = {name: tensor.double() for name, tensor in x.items()}
    group, found = case.HQ // case.H, []
    hk, size = x["hk"], x["hk"].abs()
    for t in range(case.T):
        q, k, g = (x[name][:, t] for name in "qkg")
        forget, write = g.exp()[:, :, None], -torch.expm1(g)[:, :, None]
        hk, size = hk * forget + k[..., None] * write, size * forget + k.abs()[..., None] * write
        scores = torch.einsum("bhk,bhkm->bhm", q, hk.repeat_interleave(group, 1))
        summed = torch.einsum("bhk,bhkm->bhm", q.abs(), size.repeat_interleave(group, 1)).amax(-1)
        first, second = scores.topk(2).values.unbind(-1)
        found.append(first - second > 200 + torch.finfo(BF16).eps * summed)
    return torch.stack(found, 1)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [WIDE, MODEL_1B, MODEL_7B], ids=name_of)
@pytest.mark.parametrize("gates", ["gentle", "every 16th token at -1e30"])
def test_saturated_softmax(gpu_backend, gates, case, dtype):
    """Where two slots are near each other rounding decides between them: `plain` is no measure for what a few tokens
    make of o and of the gradients. All are finite, and where one slot is clearly the first, its values are o."""
    x = inputs(case, dtype)
    if gates != "gentle":
        x["g"][:, ::16] = -1e30
    x["q"] *= 1e4
    clear = is_clear(x, case)
    assert clear.double().mean() > 0.1
    found = with_gradients(lambda z: o_alone(call(gpu_backend, z, case)[0]), x)
    for name, y in found.items():
        assert y.isfinite().all(), name
    exact = truth(x, case, final=False)
    # One token with the values of another slot would make 4 times as much.
    assert distance(found["o"][clear], exact["o"][clear]) <= torch.finfo(dtype).eps
    assert not found["dq"][clear].any()


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("case", [replace(WIDE, strength=True), replace(MODEL_1B, strength=True)], ids=name_of)
def test_one_slot_has_all_of_a_saturated_softmax(gpu_backend, case, dtype):
    """Which slot it is no rounding can change: o is what that slot holds, and nothing of its gradient goes through the
    scores."""
    x, slot = inputs(case, dtype), 5
    # All slots hold the same nonnegative keys; this one writes 4 times as much, begins with as much, forgets no sooner.
    x["s"] /= 4
    x["s"][..., slot] = 1.0
    x["g"][..., slot] = x["g"].amax(-1)
    x["k"] = x["k"].abs()
    x["hk"] = x["hk"][..., :1].abs() * torch.where(torch.arange(case.M, device=CUDA) == slot, 1.0, 0.25)
    x["q"] = 1e4 * x["q"].abs()
    found = with_gradients(lambda z: o_alone(call(gpu_backend, z, case)[0]), x)
    exact = truth(x, case, final=False)
    for name in ("o", "dv", "dhv"):
        assert distance(found[name], exact[name]) <= torch.finfo(dtype).eps, name
    for name, y in found.items():
        assert y.isfinite().all(), name
    for name in ("dq", "dk", "dhk"):
        assert not exact[name].any(), name
        assert not found[name].any(), name
    if dtype == BF16:  # in float16 `judge.plain` would have infinite scores
        verdict(found, x, case, units=units_of_strong_gates(gpu_backend, dtype, case.M), final=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("padding", [0, 37])
def test_gates_of_abc(gpu_backend, padding, dtype):
    case = Case(T=200, HQ=4, H=2, K=80, V=136, M=33, strength=True)
    x = inputs(case, dtype)
    logits = 2 * torch.randn(case.B, case.T, case.H, case.M)
    logits[:, :padding] = -1e30
    x["g"], x["s"] = (y.to(CUDA) for y in abc_gates(logits))
    if padding:  # what is before the first token is forgotten by one gate
        assert int((x["g"][:, padding] == -1e30).sum()) == x["g"][:, padding].numel()
    verdict(run(gpu_backend, x, case), x, case, units=units_of_strong_gates(gpu_backend, dtype, case.M))


def assert_prefixes_stay(
    output: Callable[[Tensors], Tensor], x: Tensors, other: Tensors, offsets: tuple[int, ...]
) -> None:
    """Whatever comes at and after each offset, no bit of o before it changes."""
    anything = any_of_them(*x["g"].shape).to(CUDA)
    with torch.no_grad():
        o = output(x)
        for t in offsets:
            for change in ("inputs", "inputs, gates to -55", "inputs, gates to anything", "gates to -1e30"):
                y = {name: tensor.clone() for name, tensor in x.items()}
                if change != "gates to -1e30":
                    for name in "qkvg":
                        y[name][:, t:] = 3 * other[name][:, t:]
                if "to" in change:
                    y["g"][:, t:] = anything[:, t:] if "anything" in change else float(change.split()[-1])
                changed = output(y)
                assert torch.equal(o[:, :t], changed[:, :t]), f"{change} after {t}"
                assert not torch.equal(o[:, t:], changed[:, t:])


OFFSETS = (1, 15, 16, 17, 31, 32, 63, 64, 65, 100, 127, 128, 129, 190, 199)
LONG_OFFSETS = (1, 1000, 2047, 2048, 2049, 4096, 4097, 4999)
LONG = Case(T=5000, B=1, HQ=4, H=2, K=64, V=64, M=32)


@pytest.mark.parametrize(
    ("case", "dtype", "offsets"),
    [
        *((WIDE, dtype, OFFSETS) for dtype in DTYPES),
        (MODEL_1B, BF16, OFFSETS),
        (MODEL_7B, BF16, OFFSETS),
        (LONG, BF16, LONG_OFFSETS),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("before", ["gentle", "single strong gates"])
def test_a_prefix_does_not_depend_on_what_follows_by_a_bit(gpu_backend, case, dtype, offsets, before):
    x, other = inputs(case, dtype), inputs(case, dtype, seed=1)
    if before != "gentle":
        x["g"][:, 20:22, :, 0], x["g"][:, 90] = -70.0, -1e5
    assert_prefixes_stay(lambda z: call(gpu_backend, z, case)[0], x, other, offsets)


def poison_free_memory() -> None:
    """Leave NaN in what the caching allocator will hand out next."""
    torch.cuda.empty_cache()
    sizes = [256 << 20] * 3 + [20 << 20] * 10 + [512 << 10] * 200 + [64 << 10] * 500 + [512] * 500
    filled = [torch.full((size // 4,), float("nan"), device=CUDA) for size in sizes]
    del filled
    # Taken before any is looked at: what a look leaves in free memory would be found by the next.
    taken = [torch.empty(size // 4, device=CUDA) for size in (20 << 20, 256 << 10)]
    assert all(x.isnan().all() for x in taken)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("case", [WIDE, Case(lengths=PACKED, HQ=4, H=2, K=80, V=136, M=33), narrow(65)], ids=name_of)
@pytest.mark.parametrize("kind", ["gentle", "single tokens"])
def test_memory_that_was_used_before_is_never_read(gpu_backend, case, dtype, kind):
    x = inputs(case, dtype)
    if case is WIDE:
        x["g"] = strong(kind, x["g"].cpu()).to(CUDA)
    elif kind != "gentle":
        x["g"][:, 40] = -1e30
    clean = run(gpu_backend, x, case)
    poison_free_memory()
    assert_same_bits(run(gpu_backend, x, case), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(0, 300, 1, 0, 257, 128, 129, 0), HQ=4, H=2, K=80, V=136, M=33, state=False),
        Case(T=5000, B=1, HQ=4, H=4, K=64, V=64, M=32, state=False),  # in segments
    ],
    ids=name_of,
)
def test_no_state_is_one_of_zeros(gpu_backend, case, dtype):
    """Bit for bit, whatever was in memory."""
    x = inputs(case, dtype)
    skip_unless_able(gpu_backend, x, case)
    zeros = trained(gpu_backend, x, case, zeros=True)
    poison_free_memory()
    assert_same_bits(trained(gpu_backend, x, case), zeros)


def inside_nan(x: Tensor, shift: int) -> Tensor:
    """x as a view into a buffer with NaN before and behind it, `shift` elements off the usual alignment."""
    nan = x.new_full((4096 + shift,), float("nan"))
    return torch.cat([nan, x.flatten(), nan])[4096 + shift :][: x.numel()].view(x.shape)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@pytest.mark.parametrize("case", [WIDE, narrow(65)], ids=name_of)
def test_what_lies_around_the_inputs_is_never_read(gpu_backend, case, dtype, shift):
    x = inputs(case, dtype)
    clean = run(gpu_backend, x, case)
    result = with_gradients(lambda z: call(gpu_backend, {name: inside_nan(y, shift) for name, y in z.items()}, case), x)
    if shift:  # other loads, perhaps another order of sums
        verdict(result, x, case)
    else:
        assert_same_bits(result, clean)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_nan_in_one_sequence_reaches_no_other(gpu_backend, dtype):
    case = Case(lengths=(70, 30, 0, 90, 8), HQ=4, H=2, K=80, V=136, M=33)
    x = inputs(case, dtype)
    clean = run(gpu_backend, x, case)
    bounds = [0, *accumulate(case.lengths)]
    for n, (start, end) in enumerate(pairwise(bounds)):
        y = {name: torch.full_like(tensor, float("nan")) for name, tensor in x.items()}
        for name in "qkvg":
            y[name][:, start:end] = x[name][:, start:end]
        for name in ("hk", "hv"):
            y[name][n] = x[name][n]
        for name, found in run(gpu_backend, y, case).items():
            mine = (n,) if "h" in name else (slice(None), slice(start, end))
            assert torch.equal(found[mine], clean[name][mine]), (n, name)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_nan_in_one_row_of_a_batch_reaches_no_other(gpu_backend, dtype):
    x = inputs(WIDE, dtype)
    clean = run(gpu_backend, x, WIDE)
    for row in range(WIDE.B):
        y = {name: torch.full_like(tensor, float("nan")) for name, tensor in x.items()}
        for name, tensor in x.items():
            y[name][row] = tensor[row]
        for name, found in run(gpu_backend, y, WIDE).items():
            assert torch.equal(found[row], clean[name][row]), (row, name)


def assert_same_on_another_stream(results: Callable[[], Tensors]) -> None:
    """Two runs and one on another stream give the same bits."""
    first = results()
    assert_same_bits(results(), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = results()
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(elsewhere, first)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((WIDE, dtype) for dtype in DTYPES),
        (MODEL_1B, BF16),
        (LONG, BF16),
        (Case(lengths=PACKED, HQ=8, H=2, K=128, V=128, M=64, strength=True), BF16),
    ],
    ids=name_of,
)
def test_two_runs_and_a_run_on_another_stream_give_the_same_bits(gpu_backend, case, dtype):
    x = inputs(case, dtype)
    x["g"][:, 40] = -1e6
    assert_same_on_another_stream(lambda: run(gpu_backend, x, case))


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_packed_is_a_loop_over_sequences(gpu_backend, dtype):
    case = Case(lengths=PACKED, HQ=4, H=2, K=80, V=136, M=33)
    x = inputs(case, dtype)

    def loop(z):
        results = []
        for n, (start, end) in enumerate(pairwise([0, *accumulate(case.lengths)])):
            one = {name: y[:, start:end] if name in "qkvg" else y[n : n + 1] for name, y in z.items()}
            results.append(call(gpu_backend, one, Case(T=end - start, B=1, HQ=4, H=2, K=80, V=136, M=33)))
        o, hk, hv = zip(*results, strict=True)
        return torch.cat(o, dim=1), torch.cat(hk), torch.cat(hv)

    packed, looped = run(gpu_backend, x, case), with_gradients(loop, x)
    assert_near(packed, looped, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("bounds", [(0, 1, 200), (0, 64, 128, 200), (0, 37, 101, 102, 200)])
def test_pieces_carried_through_states_are_one_pass(gpu_backend, bounds, dtype):
    x = inputs(WIDE, dtype)
    x["g"][:, 70, :, 3] = -200.0

    def in_pieces(z):
        outputs, state = [], (z["hk"], z["hv"])
        for start, end in pairwise(bounds):
            piece = {name: z[name][:, start:end] for name in "qkvg"} | {"hk": state[0], "hv": state[1]}
            o, *state = call(gpu_backend, piece, Case(T=end - start, HQ=4, H=2, K=80, V=136, M=33))
            outputs.append(o)
        return torch.cat(outputs, dim=1), *state

    verdict(with_gradients(in_pieces, x), x, WIDE, units=units_of_strong_gates(gpu_backend, dtype, WIDE.M))


def slices_of_one_projection(z: Tensors) -> Tensors:
    """q, k, v as a layer with one fused projection has them; gates with heads before time."""
    fused = torch.cat([z[name].flatten(2) for name in "qkv"], dim=-1)
    parts = fused.split([z[name].flatten(2).shape[-1] for name in "qkv"], dim=-1)
    views = {name: part.unflatten(-1, z[name].shape[2:]) for name, part in zip("qkv", parts, strict=True)}
    views["g"] = z["g"].transpose(1, 2).contiguous().transpose(1, 2)
    views["hk"] = z["hk"].transpose(2, 3).contiguous().transpose(2, 3)
    views["hv"] = torch.stack([z["hv"], z["hv"]], dim=-1)[..., 0]
    return views


def one_for_all(z: Tensors) -> Tensors:
    """Strides of 0: one key for all tokens, one query for all rows, one value for all heads, one gate for all slots."""
    return {
        "q": z["q"][:1].expand_as(z["q"]),
        "k": z["k"][:, :1].expand_as(z["k"]),
        "v": z["v"][:, :, :1].expand_as(z["v"]),
        "g": z["g"][..., :1].expand_as(z["g"]),
        "hk": z["hk"][:1].expand_as(z["hk"]),
        "hv": z["hv"][:, :, :1].expand_as(z["hv"]),
    }


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("view", [slices_of_one_projection, one_for_all])
def test_strides_do_not_matter(gpu_backend, view, dtype):
    x = inputs(WIDE, dtype)
    assert not any(y.is_contiguous() for y in view(x).values())
    strided = with_gradients(lambda z: call(gpu_backend, view(z), WIDE), x)
    dense = with_gradients(lambda z: call(gpu_backend, {name: y.contiguous() for name, y in view(z).items()}, WIDE), x)
    assert_near(strided, dense, dtype)


@pytest.mark.parametrize("names", ["q", "kv", "g", "s", "hk", "hv"])
def test_gradients_of_some_inputs_only(gpu_backend, names):
    case = Case(T=200, HQ=4, H=2, K=80, V=136, M=33, strength=True)
    wanted = [names] if names.startswith("h") else list(names)
    x = inputs(case, BF16)
    everything = run(gpu_backend, x, case)

    def some(z):
        return call(gpu_backend, {name: y if name in wanted else y.detach() for name, y in z.items()}, case)

    found = with_gradients(some, x)
    of_these = {f"d{name}" for name in wanted}
    assert_near({n: found[n] for n in of_these}, {n: everything[n] for n in of_these}, BF16)
    assert not any(y.any() for n, y in found.items() if n.startswith("d") and n not in of_these)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_the_gradient_is_the_sum_over_results(gpu_backend, dtype):
    x = inputs(WIDE, dtype)
    everything = run(gpu_backend, x, WIDE)

    def only(result):
        return lambda z: (y if n == result else y.detach() for n, y in enumerate(call(gpu_backend, z, WIDE)))

    parts = [with_gradients(only(result), x) for result in range(3)]
    for name, want in everything.items():
        if name.startswith("d"):
            found = sum(part[name].double() for part in parts)
            size = sum(part[name].double().norm() for part in parts)
            assert (found - want).norm() <= (64 * EPS if dtype == FP32 else torch.finfo(dtype).eps) * size, name


def random_case(data, **sizes) -> Case:
    return Case(
        T=data.draw(st.integers(1, 200)),
        B=data.draw(st.integers(1, 3)),
        strength=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 0.25, -1.0])),
        lengths=data.draw(st.none() | st.lists(st.integers(0, 150), min_size=1, max_size=5).map(tuple)),
        **sizes,
    )


def judge_random(gpu_backend: str, case: Case, dtype: torch.dtype, data) -> None:
    x = inputs(case, dtype, seed=data.draw(st.integers(0, 9)))
    if case.T:
        place = data.draw(st.integers(0, case.T - 1))
        x["g"][:, place : place + data.draw(st.integers(1, 40))] *= data.draw(st.sampled_from([0.0, 1.0, 8.0, 800.0]))
    verdict(run(gpu_backend, x, case), x, case, units=units_of_strong_gates(gpu_backend, dtype, case.M))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_length_packing_and_gates(gpu_backend, dtype):
    skip_unless_able(gpu_backend, inputs(WIDE, dtype), WIDE)

    @settings(max_examples=9, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def judged(data):
        judge_random(gpu_backend, random_case(data, HQ=4, H=2, K=80, V=136, M=33), dtype, data)

    judged()


GROUPS = (1, 2, 4, 8, 16)  # query heads a key head
SEEDS = range(8)
MOST = 2**26  # of the judge's weights [rows, H, T, T, M]; it has 8 tensors as large, in float64 half a GiB each


def width(random: np.random.Generator, least: int, most: int) -> int:
    """Half of them at the edges of tiles of 16, 64, 128, 256, and at the limit; the others anywhere."""
    edges = [n for n in (16, 17, 63, 64, 65, 128, 129, 255, 256, 257, 511, 512) if least <= n <= most]
    return int(random.choice(edges) if random.random() < 0.5 else random.integers(least, most + 1))


def any_calls(seed: int, dtype: torch.dtype, linear: bool = False) -> list[Case]:
    """Calls of other lengths and gates that share their kernels: sizes, options and whether sequences are packed.

    Eight seeds are all there is of keys wider than 256 (in gated linear attention than 64) or not, values likewise, and
    more than 64 slots or not; packed or not goes with none of these. All groups are among them. Of fewer slots, keys or
    tokens than 16 a few weights decide, with which `plain` may be lucky: such sizes are in ACCURACY.
    """
    kind = DTYPES.index(dtype)
    random = np.random.default_rng((seed, kind, linear))
    group, packed = GROUPS[(seed + 2 * kind) % len(GROUPS)], (seed.bit_count() + kind) % 2 == 1
    ranges = ((64, 256) if linear else (256, 512)), (256, 512), (64, 256)
    K, V, M = (
        width(random, 1 + edge if seed & 1 << bit else 16, most if seed & 1 << bit else edge)
        for bit, (edge, most) in enumerate(ranges)
    )
    H = int(random.integers(1, 3))
    strength, state = (bool(random.integers(2)) for _ in range(2))
    # `test_logits_that_pass_on_every_digit` says why not all scales in float32.
    scales = (0.05, -0.05) if dtype == FP32 and K > 128 else (1.0, 0.25, -1.0)
    sizes = Case(
        HQ=H * group, H=H, K=K, V=V, M=K if linear else M, strength=strength and not linear, state=state,
    )  # fmt: skip
    calls = []
    for n in range(4):
        rows = int(random.integers(2, 5) if packed else random.integers(1, 3))
        longest = min(700, math.isqrt(MOST // (rows * H * sizes.M)))
        lengths = random.integers(1, longest + 1, rows) * (random.random(rows) < 0.8)
        lengths[0] = max(16, lengths[0]) if n else longest
        shape = {"lengths": tuple(map(int, lengths))} if packed else {"B": rows, "T": int(lengths[0])}
        calls.append(replace(sizes, scale=float(random.choice(scales)), **shape))
    return calls


def stretched(g: Tensor, seed: int) -> Tensor:
    """Gates [B, T, H, M], of which some tokens forget nothing, as the others, more, or all."""
    if g.shape[1]:
        random = np.random.default_rng(seed)
        place, length = int(random.integers(g.shape[1])), int(random.integers(1, 41))
        g[:, place : place + length] *= float(random.choice([0.0, 1.0, 8.0, 800.0]))
    return g


def test_any_sizes_vary():
    for linear, edge in ((False, 256), (True, 64)):
        found = [any_calls(seed, dtype, linear) for dtype in DTYPES for seed in SEEDS]
        first = [cases[0] for cases in found]
        assert len({(case.K, case.V, case.M, case.HQ, case.H) for case in first}) == len(first)
        for n in range(0, len(first), len(SEEDS)):
            of_dtype = first[n : n + len(SEEDS)]
            assert {case.HQ // case.H for case in of_dtype} == set(GROUPS)
            assert sum(case.K == case.V for case in of_dtype) <= 1
            assert {edge < case.K for case in of_dtype} == {True, False}
            assert {(case.V > 256, case.lengths is None) for case in of_dtype} == {
                (wide, batch) for wide in (True, False) for batch in (True, False)
            }
            assert {case.state for case in of_dtype} == {True, False}
            assert linear or {case.strength for case in of_dtype} == {True, False}
            assert any(case.T == 700 or 700 in (case.lengths or ()) for case in of_dtype)
        for cases in found:
            assert len({case.T for case in cases}) > 1
            assert len({(case.K, case.V, case.M, case.HQ, case.state, case.lengths is None) for case in cases}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_sizes(gpu_backend, seed, dtype):
    for n, case in enumerate(any_calls(seed, dtype)):
        x = inputs(case, dtype, seed=n)
        x["g"] = stretched(x["g"], seed=10 * seed + n)
        try:
            verdict(run(gpu_backend, x, case), x, case, units=units_of_strong_gates(gpu_backend, dtype, case.M))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
