"""The GPU backends where indices and grids could run out, and what they say of problems that they cannot run.

Sequences are independent of each other, so whatever is far inside a huge problem is compared with the same computed
alone: an index or a grid that wraps around is not a matter of rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_gsa import (
    gated_linear_attention,
    gated_linear_attention_step,
    gated_slot_attention,
    gated_slot_attention_step,
)
from flash_gsa.errors import UsageError
from flash_gsa.ops import Problem, explain, pointwise

from . import test_linear as linear_attention
from .helpers import Case, Tensors, call
from .judge import CUDA, distance

FIRST_BEYOND = 2**31  # the first element that 32 bits do not reach
MOST_BLOCKS = 65_535  # of a launch, in all directions but the first
TOKENS = 1_000_000

gpu = pytest.mark.gpu
# Tests that need most of a GPU's memory wait for each other.
patient = pytest.mark.timeout(1200)


def big(case: Case, dtype: torch.dtype, of_gates: torch.dtype = torch.float32) -> Tensors:
    """Inputs as `helpers.make` has them, made where they are needed; gates and strengths in `of_gates`."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, device=CUDA)

    B, T, H = case.B, case.T, case.H
    x = {"q": normal(B, T, case.HQ, case.K), "k": normal(B, T, H, case.K), "v": normal(B, T, H, case.V)}
    x = {name: F.silu(tensor, inplace=True) for name, tensor in x.items()}
    gates = torch.randn(B, T, H, case.M, dtype=of_gates, device=CUDA)
    x["g"] = F.logsigmoid(gates).div_(8)
    if case.strength:
        del gates
        x["s"] = torch.rand(B, T, H, case.M, dtype=of_gates, device=CUDA)
    if case.state:
        # By slots, as a final state is: in the other order the kernels would take a copy.
        x["hk"] = torch.randn(case.sequences, H, case.M, case.K, device=CUDA).transpose(2, 3)
        x["hv"] = torch.randn(case.sequences, H, case.M, case.V, device=CUDA)
    return x


def results(backend: str, x: Tensors, case: Case, do: Tensor) -> Tensors:
    """o, the final states, and the gradients of every input for the gradient do of o."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    o, hk, hv = call(backend, leaves, case)
    gradients = torch.autograd.grad(o, list(leaves.values()), do)
    found = {"o": o, "hk": hk, "hv": hv} | {f"d{name}": y for name, y in zip(leaves, gradients, strict=True)}
    return {name: y.detach() for name, y in found.items()}


def linear_results(backend: str, x: Tensors, case: Case, do: Tensor) -> Tensors:
    """The same of gated linear attention, whose gates `big` makes for M = K; its state is called h."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    o, h = linear_attention.call(backend, leaves, case)
    gradients = torch.autograd.grad(o, list(leaves.values()), do)
    found = {"o": o, "h": h} | {f"d{name}": y for name, y in zip(leaves, gradients, strict=True)}
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


def last_of_a_packed_call(backend: str, case: Case, results=results, of_gates: torch.dtype = torch.float32) -> None:
    x = big(case, torch.bfloat16, of_gates)
    do = torch.randn(1, case.T, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(backend, x, case, do)
    last = slice(case.T - case.lengths[-1], None)
    one = {name: y[:, last].clone() for name, y in x.items()}
    alone = results(backend, one, replace(case, lengths=None, B=1, T=case.lengths[-1]), do[:, last].clone())
    assert_same(tokens(found, last) | states(found, slice(-1, None)), alone)


def last_of_a_batch(backend: str, case: Case, results=results) -> None:
    x = big(case, torch.bfloat16)
    do = torch.randn(case.B, case.T, case.HQ, case.V, dtype=torch.bfloat16, device=CUDA)
    found = results(backend, x, case, do)
    one = {name: y[-1:].clone() for name, y in x.items()}
    alone = results(backend, one, replace(case, B=1), do[-1:].clone())
    assert_same({name: y[-1:] for name, y in found.items()}, alone)


def outputs_of_the_last(case: Case) -> None:
    """The forward of a packed call."""
    x = big(case, torch.bfloat16)
    last = slice(case.T - case.lengths[-1], None)
    one = {name: y[:, last].clone() for name, y in x.items()}
    with torch.no_grad():
        o, *final = call("triton", x, case)
        alone, *of_it = call("triton", one, replace(case, lengths=None, B=1, T=case.lengths[-1]))
    names = "o", "hk", "hv"
    assert_same(
        dict(zip(names, (o[:, last], *(y[-1:] for y in final)), strict=True)),
        dict(zip(names, (alone, *of_it), strict=True)),
    )


@gpu
@patient
@pytest.mark.long
def test_tensors_of_more_elements_than_32_bits_count(gpu_room):
    # Of triton alone: `chunk` leaves its offsets to PyTorch, and its float32 copies of these would not fit.
    # One test for all of them, so that they are never in memory at the same time.
    gpu_room(45)
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
    torch.cuda.empty_cache()
    # Of the initial and final states, their gradients, and the chunks' states. In GB: 9 for each of the initial state,
    # the final, the (zero) gradient of the final and that of the initial; 4 and 4 for chunks' states and gradients.
    last_of_a_batch("triton", Case(B=FIRST_BEYOND // (H * wide * M) + 1, T=3, HQ=H, H=H, K=wide, V=16, M=M))
    torch.cuda.empty_cache()
    # Of gates in float32 and what is prepared of them; the forward alone. In GB: 9 for gates, 9 for their sums, 4 for
    # weights in 16 bits, 2 for chunks' states. The next test has a backward.
    most = 256
    outputs_of_the_last(Case(lengths=(FIRST_BEYOND // (H * most), 300), HQ=H, H=H, K=16, V=16, M=most, state=False))


@gpu
@patient
def test_gradients_of_more_gates_than_32_bits_count(gpu_room):
    """Of gates and strengths in 16 bits: 71 GB. In float32 it would be 84, more than an H100 gives."""
    # In GB. Forward: 4 and 4 for gates and strengths, 9 for sums of gates, 4 for weights, 4 for the softmax, 2 for
    # chunks' states. Backward: 9 for dg, 4 for ds, 9 and 4 for what `inputs_backward` hands on, 13 for what else is
    # between its kernels in 16 bits, 2 for gradients of chunks' states. Else, heads being of 16 numbers, 3.
    gpu_room(68)
    H, most = 4, 256
    case = Case(lengths=(FIRST_BEYOND // (H * most), 300), HQ=H, H=H, K=16, V=16, M=most, strength=True, state=False)
    last_of_a_packed_call("triton", case, of_gates=torch.bfloat16)


@gpu
@patient
def test_gated_linear_attention_of_more_values_than_32_bits_count(gpu_room):
    # In GB: 4 for each of v, o, their two gradients, 1 for chunks' states and their gradients.
    gpu_room(20)
    H, V, T = 4, 512, 1024
    case = Case(B=FIRST_BEYOND // (H * V * T) + 1, T=T, HQ=H, H=H, K=16, V=V, M=16, state=False)
    last_of_a_batch("triton", case, linear_results)


@gpu
@patient
def test_gated_linear_attention_of_more_keys_than_32_bits_count(gpu_room):
    # In GB: 4 for each of q, k, dq, dk and one between kernels, 9 for gates, 9 for their sums, 9 for their gradients,
    # 4 for weights, 9 and 4 for what `inputs_backward` hands on, 2 for chunks' states and their gradients; else 2.
    gpu_room(65)
    H, K = 4, 256
    case = Case(lengths=(FIRST_BEYOND // (H * K), 300), HQ=H, H=H, K=K, V=16, M=K, state=False)
    last_of_a_packed_call("triton", case, linear_results)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """What a kernel does not write is NaN, and not what another left there."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


ROW = 2048


def norm_weight() -> Tensor:
    return torch.linspace(0.5, 1.5, ROW, device=CUDA)


# Of each: how many inputs, and GiB for them, for what it gives, and for their gradients.
POINTWISE: dict[str, tuple[int, int, Callable[..., tuple[Tensor, ...]]]] = {
    "silu_each": (3, 37, pointwise.silu_each),
    "log_gates": (1, 17, lambda f: (pointwise.log_gates(f, 8.0),)),
    "silu_norm": (1, 13, lambda x: (pointwise.silu_norm(x, norm_weight(), 1e-5),)),
    "add_norm": (2, 21, lambda x, branch: pointwise.add_norm(x, branch, norm_weight(), 1e-5)),
    "swiglu": (2, 21, lambda gate, up: (pointwise.swiglu(gate, up),)),
}


def with_gradients(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """What `function` gives, and the gradients of all inputs, those of its results being the results themselves."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    outgoing = [y.detach() for y in found]
    return [*outgoing, *torch.autograd.grad(found, leaves, outgoing)]


@gpu
@patient
@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("name", POINTWISE)
def test_rows_behind_what_32_bits_count(gpu_room, name):
    """Bit for bit: rows have nothing to do with each other."""
    count, gib, function = POINTWISE[name]
    gpu_room(gib)
    behind = 8
    rows = FIRST_BEYOND // ROW + behind
    inputs = [torch.randn(rows, ROW, dtype=torch.bfloat16, device=CUDA) for _ in range(count)]
    assert pointwise.uses_kernels(*inputs)
    alone = with_gradients(function, [x[-behind:].clone() for x in inputs])
    found = with_gradients(function, inputs)
    assert len(found) == len(alone)
    for y, want in zip(found, alone, strict=True):
        assert want.isfinite().all()
        assert torch.equal(y[-behind:], want)


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


SIZES = {"K": 64, "V": 64, "M": 32, "dtype": torch.float16, "device": "cuda"}
UNABLE = [
    ("float64", {"dtype": torch.float64}, "float64"),
    ("wide values", {"V": 600}, "V = 600"),
    ("CPU", {"device": "cpu"}, "cpu"),
]
UNABLE_SLOTS = [*UNABLE, ("wide keys", {"K": 600}, "K = 600"), ("many slots", {"M": 300}, "M = 300")]
UNABLE_MATRIX = [*UNABLE, ("wide keys", {"K": 300}, "keys wider than 256 in gated linear attention .K = 300.")]


def state_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor, linear: bool):
    """Zeros, in the format that states have."""
    like = {"dtype": torch.float64 if q.dtype == torch.float64 else torch.float32, "device": q.device}
    heads = *k.shape[:1], k.shape[-2]
    if linear:
        return torch.zeros(*heads, k.shape[-1], v.shape[-1], **like)
    return tuple(torch.zeros(*heads, *d, **like) for d in ((k.shape[-1], g.shape[-1]), (g.shape[-1], v.shape[-1])))


@pytest.mark.parametrize("step", [False, True], ids=["sequence", "step"])
@pytest.mark.parametrize(
    ("linear", "change", "words"),
    [
        pytest.param(linear, change, words, id=f"{operator}, {name}", marks=() if "device" in change else gpu)
        for operator, linear, unable in (("slots", False, UNABLE_SLOTS), ("linear", True, UNABLE_MATRIX))
        for name, change, words in unable
    ],
)
def test_triton_refuses_what_it_cannot_run_and_names_what_can(linear, change, words, step):
    sizes = SIZES | change
    if sizes["device"] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    K, V, M = (sizes[name] for name in "KVM")
    M = K if linear else M
    place = {name: sizes[name] for name in ("dtype", "device")}
    problem = Problem(B=1, T=1 if step else 8, HQ=2, H=1, K=K, V=V, M=M, linear=linear, **place)
    if sizes["device"] == "cpu" and dict(explain(problem))["triton"] is None:
        pytest.skip("triton runs on the CPU here: TRITON_INTERPRET=1")
    x = [torch.zeros(1, 8, n, d, **place) for n, d in ((2, K), (1, K), (1, V), (1, M))]
    options = {}
    if step:
        x = [y[:, 0] for y in x]
        options["state"] = state_of(*x, linear)
    operator = {
        (False, False): gated_slot_attention,
        (False, True): gated_slot_attention_step,
        (True, False): gated_linear_attention,
        (True, True): gated_linear_attention_step,
    }[linear, step]
    with pytest.raises(UsageError, match=rf"'triton' cannot run this: .*{words}.* These can: .*chunk"):
        operator(*x, **options, backend="triton")
    o, _ = operator(*x, **options)
    assert o.shape == (*x[0].shape[:-1], V)
