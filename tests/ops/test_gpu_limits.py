"""The GPU backends where indices and grids could run out, and what they say of problems that they cannot run.

Sequences are independent of each other, so whatever is far inside a huge problem is compared with the same computed
alone: an index or a grid that wraps around is not a matter of rounding.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_gsa import gated_slot_attention
from flash_gsa.errors import UsageError
from flash_gsa.ops import Problem, explain

from .helpers import Case, Tensors, call
from .judge import CUDA, distance

FIRST_BEYOND = 2**31  # the first element that 32 bits do not reach
MOST_BLOCKS = 65_535  # of a launch, in all directions but the first
TOKENS = 1_000_000

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def big(case: Case, dtype: torch.dtype) -> Tensors:
    """Inputs as `helpers.make` has them, made where they are needed."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, device=CUDA)

    B, T, H = case.B, case.T, case.H
    x = {"q": normal(B, T, case.HQ, case.K), "k": normal(B, T, H, case.K), "v": normal(B, T, H, case.V)}
    x = {name: F.silu(tensor, inplace=True) for name, tensor in x.items()}
    gates = torch.randn(B, T, H, case.M, device=CUDA)
    x["g"] = F.logsigmoid(gates).div_(8)
    if case.state:
        x["hk"] = torch.randn(case.sequences, H, case.K, case.M, device=CUDA)
        x["hv"] = torch.randn(case.sequences, H, case.M, case.V, device=CUDA)
    return x


def results(backend: str, x: Tensors, case: Case, do: Tensor) -> Tensors:
    """o, the final states, and the gradients of every input for the gradient do of o."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    o, hk, hv = call(backend, leaves, case)
    gradients = torch.autograd.grad(o, list(leaves.values()), do)
    found = {"o": o, "hk": hk, "hv": hv} | {f"d{name}": y for name, y in zip(leaves, gradients, strict=True)}
    return {name: y.detach() for name, y in found.items()}


def assert_same(found: Tensors, alone: Tensors) -> None:
    """Equal but for rounding, in whatever order the sums were taken."""
    for name, want in alone.items():
        assert found[name].shape == want.shape, name
        assert distance(found[name], want) < 0.03, name


def tokens(found: Tensors, places: slice) -> Tensors:
    """Of results by token, those of some tokens."""
    return {name: y[:, places] for name, y in found.items() if "h" not in name}


def states(found: Tensors, places: slice) -> Tensors:
    """Of results by sequence, those of some sequences."""
    return {name: y[places] for name, y in found.items() if "h" in name}


def last_of_a_packed_call(backend: str, case: Case) -> None:
    x = big(case, torch.bfloat16)
    do = torch.randn(1, case.T, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(backend, x, case, do)
    last = slice(case.T - case.lengths[-1], None)
    one = {name: y[:, last].clone() for name, y in x.items()}
    alone = results(backend, one, replace(case, lengths=None, B=1, T=case.lengths[-1]), do[:, last].clone())
    assert_same(tokens(found, last) | states(found, slice(-1, None)), alone)


def last_of_a_batch(backend: str, case: Case) -> None:
    x = big(case, torch.bfloat16)
    do = torch.randn(case.B, case.T, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(backend, x, case, do)
    one = {name: y[-1:].clone() for name, y in x.items()}
    alone = results(backend, one, replace(case, B=1), do[-1:].clone())
    assert_same({name: y[-1:] for name, y in found.items()}, alone)


@gpu
def test_tensors_of_more_elements_than_32_bits_count():
    # Of triton alone: `chunk` leaves its offsets to PyTorch, and its float32 copies of these would not fit.
    # One test for both layouts, so that they are never in memory at the same time.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free GPU memory")
    H, wide, M = 4, 512, 64
    from flash_gsa.ops.triton import tiles

    # The last sequence is the one behind the 2³¹ elements: of q, k and, at 64 tokens a chunk, of the chunks' states.
    first = FIRST_BEYOND // (H * wide)
    chosen = tiles.choose(torch.bfloat16, wide, 16, M, 1, torch.device(CUDA))
    with tiles.using(replace(chosen, C=64, BT=64)):
        last_of_a_packed_call("triton", Case(lengths=(first, 300), HQ=H, H=H, K=wide, V=16, M=M, state=False))
    torch.cuda.empty_cache()
    # Of v and o.
    T = 1024
    last_of_a_batch("triton", Case(B=first // T + 1, T=T, HQ=H, H=H, K=16, V=wide, M=16, state=False))


SMALL = Case(HQ=2, H=1, K=16, V=16, M=16)
EDGES = (slice(0, 2), slice(MOST_BLOCKS // 2 - 1, MOST_BLOCKS // 2 + 2), slice(MOST_BLOCKS - 2, MOST_BLOCKS + 2))


@gpu
def test_more_packed_sequences_than_a_grid_has_blocks(gpu_backend):
    case = replace(SMALL, lengths=(1, 2) * 35_000)
    x = big(case, torch.bfloat16)
    do = torch.randn(1, case.T, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(gpu_backend, x, case, do)
    bounds = case.cu_seqlens
    for place in (*EDGES, slice(case.sequences - 2, case.sequences)):
        lengths = case.lengths[place]
        mine = slice(int(bounds[place.start]), int(bounds[place.stop]))
        few = tokens(x, mine) | states(x, place)
        alone = results(gpu_backend, few, replace(SMALL, lengths=lengths), do[:, mine])
        assert_same(tokens(found, mine) | states(found, place), alone)


@gpu
def test_more_rows_than_a_grid_has_blocks(gpu_backend):
    case = replace(SMALL, B=70_000, T=1)
    x = big(case, torch.bfloat16)
    do = torch.randn(case.B, 1, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(gpu_backend, x, case, do)
    for place in (*EDGES, slice(case.B - 2, case.B)):
        few = {name: y[place] for name, y in x.items()}
        alone = results(gpu_backend, few, replace(case, B=place.stop - place.start), do[place])
        assert_same({name: y[place] for name, y in found.items()}, alone)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_sequence_of_a_million_tokens(gpu_backend, dtype):
    # Gates like these leave e^-60 of what was 600 tokens ago, so that the last 100 tokens need the last 700 only.
    case = replace(SMALL, lengths=(TOKENS,), state=False)
    x = big(case, dtype)
    do = torch.randn(1, TOKENS, case.HQ, case.V, dtype=dtype, device=CUDA)
    found = results(gpu_backend, x, case, do)
    window = slice(TOKENS - 700, None)
    alone = results(gpu_backend, tokens(x, window), replace(SMALL, lengths=(700,), state=False), do[:, window])
    judged = slice(-100, None)
    assert_same(tokens(found, judged) | states(found, slice(None)), tokens(alone, judged) | states(alone, slice(None)))
    start = slice(0, 700)
    alone = results(gpu_backend, tokens(x, start), replace(SMALL, lengths=(700,), state=False), do[:, start])
    assert_same({"o": found["o"][:, start], "dq": found["dq"][:, start]}, {"o": alone["o"], "dq": alone["dq"]})
    assert all(y.isfinite().all() for y in found.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"dtype": torch.float64}, "float64", marks=gpu),
        pytest.param({"K": 600}, "K = 600", marks=gpu),
        pytest.param({"V": 600}, "V = 600", marks=gpu),
        pytest.param({"M": 300}, "M = 300", marks=gpu),
        ({"device": "cpu"}, "cpu"),
    ],
    ids=["float64", "K", "V", "M", "cpu"],
)
def test_triton_refuses_what_it_cannot_run_and_names_what_can(change, words):
    sizes = {"K": 64, "V": 64, "M": 32, "dtype": torch.float16, "device": "cuda"} | change
    if sizes["device"] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reasons = dict(explain(Problem(B=1, T=8, HQ=2, H=1, **sizes)))
    if sizes["device"] == "cpu" and reasons["triton"] is None:
        pytest.skip("triton runs on the CPU here: TRITON_INTERPRET=1")
    K, V, M = (sizes[name] for name in "KVM")
    like = {"dtype": sizes["dtype"], "device": sizes["device"]}
    q, k, v, g = (torch.zeros(1, 8, n, d, **like) for n, d in ((2, K), (1, K), (1, V), (1, M)))
    with pytest.raises(UsageError, match=rf"'triton' cannot run this: .*{words}.* These can: .*chunk"):
        gated_slot_attention(q, k, v, g, backend="triton")
    o, _ = gated_slot_attention(q, k, v, g)
    assert o.shape == (1, 8, 2, V)
