"""The operators under torch.compile: graphs without a break, few of them, and what eager mode gives.

Of the backends, `chunk` is tested where this file is collected, and `triton` in Triton's interpreter, which is chosen
when triton is imported: collected without TRITON_INTERPRET=1, one test here starts a process of its own for it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flash_gsa import gated_linear_attention, gated_slot_attention
from flash_gsa.layers import attention
from flash_gsa.models import loss
from flash_gsa.ops import linears, opaque

from . import test_linear as linear
from .helpers import EPS, Case, Tensors, make, with_gradients
from .interpreter import run_in_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "chunk"
CASE = Case(T=20, HQ=1 if INTERPRETED else 2, H=1, K=5, V=4, M=3, scale=0.7)


# The interpreter takes a quarter of a second for a chunk.
plain_only = pytest.mark.skipif(INTERPRETED, reason="nothing here depends on the backend")


@pytest.fixture(autouse=True)
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(function):
    """`function` in one graph, forward and backward traced, each operation run as PyTorch has it."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def slots(q, k, v, g, s=None, hk=None, hv=None, cu_seqlens=None, **options):
    """o and the final states."""
    state = None if hk is None else (hk, hv)
    o, (hk, hv) = gated_slot_attention(
        q, k, v, g, s,
        scale=CASE.scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=BACKEND,
        **options,
    )  # fmt: skip
    return o, hk, hv


def matrix(q, k, v, g, state=None, cu_seqlens=None):
    """o and the final state of gated linear attention."""
    return gated_linear_attention(
        q, k, v, g,
        scale=CASE.scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=BACKEND,
    )  # fmt: skip


def results(function, x: Tensors, case: Case = CASE, **options) -> Tensors:
    """What `function` returns and the gradients of all inputs."""
    gradients = linear.with_gradients if "state" in x else with_gradients
    return gradients(lambda z: function(**z, cu_seqlens=case.cu_seqlens, **options), x)


def assert_same(found: dict[str, Any], wanted: dict[str, Any], units: int = 0) -> None:
    """Equal by bits, or up to `units` of float32 in the last place of the norm."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if want is None:
            assert found[name] is None, name
        elif units == 0:
            assert torch.equal(found[name], want), name
        else:
            assert (found[name] - want).norm() <= units * EPS * want.norm(), name


def packed(*lengths: int) -> Case:
    return replace(CASE, lengths=lengths, B=1)


# Never one sequence alone, nor one chunk alone: sizes of 1 get a graph of their own.
LENGTHS = {
    "batch": [replace(CASE, B=B, T=T) for B, T in ((2, 20), (3, 15), (2, 34), (2, 2), (3, 20))],
    "packed": [packed(*lengths) for lengths in ((5, 15), (9, 0, 2), (0, 34), (0, 3, 0, 11), (20, 4))],
}


@pytest.mark.parametrize(
    ("operator", "layout"),
    [(slots, "batch"), (slots, "packed"), (matrix, "batch"), pytest.param(matrix, "packed", marks=plain_only)],
)
def test_two_graphs_serve_all_lengths(graphs, operator, layout):
    function = compiled(operator)
    for i, case in enumerate(LENGTHS[layout]):
        x = make(case) if operator is slots else linear.make(case)
        found = results(function, x, case)
        if i == 1 or not INTERPRETED:
            assert_same(found, results(operator, x, case))
    assert graphs() <= 2


def test_short_sequences_without_states_take_two_graphs_more(graphs):
    """PyTorch compiles anew for a size of 0 or 1: once for no state between chunks, once for one, and for no more."""

    def train(q, k, v, g, cu_seqlens):
        nothing = q.new_zeros(0)
        return gated_slot_attention(q, k, v, g, cu_seqlens=cu_seqlens, backend=BACKEND)[0], nothing, nothing

    function = compiled(train)
    for lengths in ((30, 40), (9, 50, 6), (9, 5, 6), (10, 3), (8, 10), (4, 5, 6), (34, 20)):
        case = replace(packed(*lengths), state=False)
        results(function, make(case), case)
    assert graphs() <= 4


@plain_only
def test_strong_gates():
    x = make(replace(CASE, strength=True))
    x["g"][:, 7:9, :, 1] = x["g"][:, 16] = -1e3
    assert_same(results(compiled(slots), x), results(slots, x))


def test_any_dimension_may_be_dynamic(graphs):
    x = make(CASE)
    function = torch.compile(slots, fullgraph=True, backend="aot_eager", dynamic=True)
    assert all(torch.equal(y, want) for y, want in zip(function(**x), slots(**x), strict=True))


def test_the_training_call_without_any_state():
    def train(q, k, v, g, cu_seqlens):
        return gated_slot_attention(q, k, v, g, cu_seqlens=cu_seqlens, backend=BACKEND)[0]

    def train_linear(q, k, v, g, cu_seqlens):
        return gated_linear_attention(q, k, v, g, cu_seqlens=cu_seqlens, backend=BACKEND)[0]

    def in_one(function):
        return lambda **z: (function(**z), z["q"].new_zeros(0), z["q"].new_zeros(0))

    for function, case in ((train, packed(0, 7, 13)), (train_linear, CASE)):
        x = make(replace(case, state=False, M=case.K))
        assert_same(results(in_one(compiled(function)), x, case), results(in_one(function), x, case))


def test_states_may_be_computed_again():
    x = make(CASE)
    kept = results(slots, x)
    assert_same(results(slots, x, states="recompute"), kept)
    assert_same(results(compiled(slots), x, states="recompute"), kept)


@pytest.mark.parametrize("states", [pytest.param("keep", marks=plain_only), "recompute"])
def test_activation_checkpointing(states):
    x = make(CASE)

    def checkpointed(**z):
        return checkpoint(slots, **z, states=states, use_reentrant=False)

    kept = results(slots, x)
    for function in (checkpointed, compiled(checkpointed)):
        assert_same(results(function, x), kept)


def test_gradients_of_some_inputs_and_of_one_result():
    x = make(CASE)

    def values_of_keys(q, k, v, g, hk, hv, cu_seqlens):
        o, hk, hv = slots(q.detach(), k, v, g.detach(), None, hk.detach(), hv.detach(), cu_seqlens)
        return o, hk.detach(), hv.detach()

    def only_states(**z):
        o, hk, hv = slots(**z)
        return o.detach(), hk.detach(), hv

    for function in (only_states,) if INTERPRETED else (only_states, values_of_keys):
        assert_same(results(compiled(function), x), results(function, x))


def test_without_gradients():
    x = make(CASE)
    function = compiled(slots)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(torch.equal(y, want) for y, want in zip(function(**x), slots(**x), strict=True))


@plain_only
def test_views():
    x = make(CASE)

    def strided(cu_seqlens=None, **z):
        return slots(**{name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in z.items()})

    assert_same(results(compiled(strided), x), results(slots, x))


@plain_only
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_autocast_rounds_nothing_inside(backend):
    """Not even in a backward that runs under autocast."""
    x = make(CASE)
    exact = results(slots, x)
    function = torch.compile(slots, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(function, x), exact)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def opaque_calls(case: Case, device: str = "cpu") -> list[tuple[Any, tuple]]:
    """Operators that hold plain PyTorch, and arguments for them."""
    x, y = (linear.to(z, device) for z in (make(replace(case, strength=True)), linear.make(case)))
    cu = case.cu_seqlens if case.cu_seqlens is None else case.cu_seqlens.to(device)
    all_of_them, few = list(x.values()), [*list(x.values())[:4], None, None, None]
    o, hk, hv = slots(**x, cu_seqlens=cu)
    matrices, state = [y[name] for name in "qkvg"], y["state"]
    rows = [torch.randn(1, 20, heads, 4, device=device) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 5, 5, 20], device=device)
    return [
        (opaque._sequence, ("chunk", *map(leaf, all_of_them), cu, 0.7)),
        (opaque._sequence, ("chunk", *map(leaf, few[:4]), None, None, None, cu, 0.7)),
        (opaque._sequence_backward, ("chunk", *all_of_them, cu, 0.7, o, hk, hv)),
        (opaque._sequence_backward, ("chunk", *few, cu, 0.7, None, hk, None)),
        (opaque._linear, ("chunk", *map(leaf, matrices), leaf(state), cu, 0.7)),
        (opaque._linear_backward, ("chunk", *matrices, state, cu, 0.7, o, state)),
        (opaque._linear_backward, ("chunk", *matrices, None, cu, 0.7, o, None)),
        (attention._packed_op, (*map(leaf, rows), bounds, None)),
        (attention._packed_op, (*map(leaf, rows), bounds, 3)),
        (attention._packed_backward_op, (*rows, bounds, 3, torch.randn_like(rows[0]))),
        *loss_calls(device),
    ]


def loss_calls(device: str) -> list[tuple[Any, tuple]]:
    """The loss of 20 tokens, 8 at a time, with gradients of both inputs and of one."""
    hidden, weight = torch.randn(20, 6, device=device), torch.randn(11, 6, device=device)
    targets = torch.arange(20, device=device) % 11
    targets[::7] = -100
    return [
        (
            loss._in_pieces_op,
            (*(leaf(x) if need else x for x, need in zip((hidden, weight), needed, strict=True)),
             targets, 8, torch.float32, *needed),
        )
        for needed in ((True, True), (True, False), (False, True))
    ]  # fmt: skip


def swiglu_calls(device: str) -> list[tuple[Any, tuple]]:
    """Operators of an MLP, which hold a kernel, and arguments for them; `test_linears.py` has more."""
    gate, up, weight, dy = (torch.randn(*size, device=device) for size in ((4, 33), (4, 33), (17, 33), (4, 17)))
    return [
        (linears.swiglu_linear_op, tuple(map(leaf, (gate, up, weight)))),
        (linears.swiglu_linear_backward_op, (dy, gate, up, weight, True)),
    ]


def triton_calls(case: Case, device: str = "cpu") -> list[tuple[Any, tuple]]:
    """Operators of the Triton backend and arguments for them."""
    from flash_gsa.ops.triton import abc, library, step, step_linear

    x, y = (linear.to(z, device) for z in (make(replace(case, strength=True)), linear.make(case)))
    cu = case.cu_seqlens if case.cu_seqlens is None else case.cu_seqlens.to(device)
    x["hk"] = x["hk"].transpose(2, 3).contiguous()
    all_of_them, few = list(x.values()), [*list(x.values())[:4], None, None, None]
    o, hk, hv, *shared = library.attention_op(*all_of_them, cu, 0.7, True, True, False)
    less = list(library.attention_op(*few, cu, 0.7, False, True, True)[3:])
    assert [y.numel() for y in less[-2:]] == [0, 0]  # states that are computed again are not kept
    matrices, state = [y[name] for name in "qkvg"], y["state"]
    _, _, *of_matrices = library.linear_attention_op(*matrices, state, cu, 0.7, True)
    token = [tensor[:, 0] for tensor in all_of_them[:5]]
    normalizer = torch.randn(case.sequences, case.H, case.M, device=device)
    g, s, z = abc.abc_op(x["g"], normalizer, cu)
    return [
        (library.attention_op, (*map(leaf, all_of_them), cu, 0.7, True, True, False)),
        (library.attention_op, (*few, cu, 0.7, False, False, False)),
        (library.attention_backward_op, (*all_of_them, cu, shared, o, hk, hv, 0.7)),
        (library.attention_backward_op, (*few, cu, less, o, None, None, 0.7)),
        (library.linear_attention_op, (*map(leaf, matrices), leaf(state), cu, 0.7, True)),
        (library.linear_attention_backward_op, (*matrices, state, cu, of_matrices, o, state, 0.7)),
        (library.linear_attention_backward_op, (*matrices, None, cu, of_matrices, o, None, 0.7)),
        (abc.abc_op, (leaf(x["g"]), leaf(normalizer), cu)),
        (abc.abc_backward_op, (g, s, normalizer, cu, [g, s, z], torch.float32)),
        (abc.abc_backward_op, (g, s, None, cu, [g, s, z], torch.float32)),
        (step._anew_op, (*token, x["hk"].transpose(2, 3)[:1], x["hv"][:1], 0.7)),
        (step._in_place_op, (*token, x["hk"].transpose(2, 3)[:1], x["hv"][:1], 0.7)),
        (step_linear._op, (*(y[:, 0] for y in matrices), state[:1], 0.7)),
    ]


def operators() -> set[str]:
    """All of this package that torch.compile can meet."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flash_gsa::")}


# No chunk is left over in them: what nobody needs is not written, and would differ between two calls.
@pytest.mark.parametrize("case", [replace(CASE, B=1), packed(5, 15)], ids=["batch", "packed"])
def test_operators_are_what_they_are_registered_as(case):
    checked = set()
    for operator, arguments in triton_calls(case) if INTERPRETED else opaque_calls(case):
        # In the interpreter everything once, and of all other calls what their results look like.
        seen = INTERPRETED and (operator._qualname in checked or case.lengths is not None)
        torch.library.opcheck(operator, arguments, **({"test_utils": "test_faketensor"} if seen else {}))
        checked.add(operator._qualname)
    known = {name for name in operators() if not name.startswith("flash_gsa::swiglu_linear")}  # has tests of its own
    plain = ("flash_gsa::any_", "flash_gsa::packed_attention", "flash_gsa::cross_entropy")
    others = {name for name in known if name.startswith(plain)}
    assert checked == (known - others if INTERPRETED else others)


if not INTERPRETED:

    @pytest.mark.timeout(1800)
    def test_triton_in_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")
        run_in_interpreter(__file__)

    # With the heads of `test_gpu_numerics.WIDE`, whose kernels are there already. No chunk of 32 tokens is left over.
    @pytest.mark.gpu
    @pytest.mark.parametrize("lengths", [None, (5, 35)], ids=["batch", "packed"])
    def test_operators_on_a_gpu_are_what_they_are_registered_as(lengths):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        case = Case(T=40, B=1, HQ=4, H=2, K=80, V=136, M=33, scale=0.7, lengths=lengths)
        checked = set()
        for calls in (triton_calls(case, "cuda"), opaque_calls(case, "cuda"), swiglu_calls("cuda")):
            for operator, arguments in calls:
                torch.library.opcheck(operator, arguments)
                checked.add(operator._qualname)
        assert checked == operators()

    @pytest.mark.timeout(1800)
    def test_inductor():
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            pytest.skip("torch.compile needs a C++ compiler for the CPU")

        def layer(q, k, v, f):
            return gated_slot_attention(F.silu(q), F.silu(k), F.silu(v), F.logsigmoid(f) / 8, backend=BACKEND)[0].sin()

        x = make(replace(CASE, state=False))
        x = {"q": x["q"], "k": x["k"], "v": x["v"], "f": 8 * x["g"]}

        def in_one(function):
            return lambda **z: (function(**z), z["q"].new_zeros(0), z["q"].new_zeros(0))

        found = with_gradients(lambda z: in_one(torch.compile(layer, fullgraph=True))(**z), x)
        assert_same(found, with_gradients(lambda z: in_one(layer)(**z), x), units=64)

else:

    def test_lengths_that_are_cut_into_segments_take_no_graph_of_their_own(graphs, monkeypatch):
        from flash_gsa.ops.triton import plan

        monkeypatch.setattr(plan, "FILLING", 1)
        function = compiled(slots)
        with torch.no_grad():
            for T in (20, 34, 100):  # in segments of 8, 8 and 16 chunks
                x = make(replace(CASE, T=T, state=False))
                assert torch.equal(function(**x)[0], slots(**x)[0])
        assert graphs() <= 2
