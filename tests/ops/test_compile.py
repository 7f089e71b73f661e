"""The operators and models under torch.compile: graphs without a break, few of them, and what eager mode gives.

Of the backends, `chunk` is tested where this file is collected, and `triton` in Triton's interpreter, which is chosen when
triton is imported: collected without TRITON_INTERPRET=1, one test here starts a process of its own for it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flash_gsa import GSAConfig, GSAForCausalLM, gated_linear_attention, gated_slot_attention
from flash_gsa.ops import opaque

from . import test_linear as linear
from .helpers import EPS, Case, Tensors, make, with_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "chunk"
CASE = Case(T=20, HQ=1 if INTERPRETED else 2, H=1, K=5, V=4, M=3, scale=0.7)


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
    "batch": [replace(CASE, B=B, T=T) for B, T in ((2, 20), (3, 15), (2, 34), (4, 2), (3, 20))],
    "packed": [packed(*lengths) for lengths in ((5, 15), (34, 0, 2), (0, 9), (3, 3, 0, 11), (20, 4))],
}


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("operator", [slots, matrix])
def test_two_graphs_serve_all_lengths(graphs, operator, layout):
    function = compiled(operator)
    for case in LENGTHS[layout]:
        x = make(case) if operator is slots else linear.make(case)
        assert_same(results(function, x, case), results(operator, x, case))
    assert graphs() <= 2


def test_any_dimension_may_be_dynamic(graphs):
    x = make(CASE)
    assert_same(results(torch.compile(slots, fullgraph=True, backend="aot_eager", dynamic=True), x), results(slots, x))


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


@pytest.mark.parametrize("states", ["keep", "recompute"])
def test_activation_checkpointing(states):
    x = make(CASE)

    def checkpointed(**z):
        return checkpoint(slots, **z, states=states, use_reentrant=False)

    kept = results(slots, x)
    assert_same(results(checkpointed, x), kept)
    assert_same(results(compiled(checkpointed), x), kept)


def test_gradients_of_some_inputs_and_of_one_result():
    x = make(CASE)

    def values_of_keys(q, k, v, g, hk, hv, cu_seqlens):
        o, hk, hv = slots(q.detach(), k, v, g.detach(), None, hk.detach(), hv.detach(), cu_seqlens)
        return o, hk.detach(), hv.detach()

    def only_states(**z):
        o, hk, hv = slots(**z)
        return o.detach(), hk.detach(), hv

    for function in (values_of_keys, only_states):
        assert_same(results(compiled(function), x), results(function, x))


def test_without_gradients():
    x = make(CASE)
    function = compiled(slots)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(torch.equal(y, want) for y, want in zip(function(**x), slots(**x), strict=True))


def test_views():
    x = make(CASE)

    def strided(cu_seqlens=None, **z):
        return slots(**{name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in z.items()})

    assert_same(results(compiled(strided), x), results(slots, x))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_autocast_rounds_nothing_inside(backend):
    """Not even in a backward that runs under autocast."""
    x = make(CASE)
    exact = results(slots, x)
    function = torch.compile(slots, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(function, x), exact)


def opaque_calls(case: Case) -> dict[str, list[tuple]]:
    """Calls of every operator in opaque.py."""
    x, y, cu = make(replace(case, strength=True)), linear.make(case), case.cu_seqlens
    inputs = [leaf(x[name]) for name in ("q", "k", "v", "g", "s", "hk", "hv")]
    bare = [*inputs[:4], None, None, None]
    o, hk, hv = opaque._sequence(BACKEND, *x.values(), cu, 0.7)
    matrices = [leaf(y[name]) for name in ("q", "k", "v", "g", "state")]
    return {
        "any_backend": [(opaque._sequence, (BACKEND, *z, cu, 0.7)) for z in (inputs, bare)],
        "any_backend_backward": [
            (opaque._sequence_backward, (BACKEND, *map(cut, z), cu, 0.7, *outgoing))
            for z, outgoing in ((inputs, (o, hk, hv)), (bare, (o, None, None)), (bare, (None, hk, None)))
        ],
        "any_linear_backend": [
            (opaque._linear, (BACKEND, *z, cu, 0.7)) for z in (matrices, [*matrices[:4], None])
        ],
        "any_linear_backend_backward": [
            (opaque._linear_backward, (BACKEND, *map(cut, matrices), cu, 0.7, o, y["state"])),
            (opaque._linear_backward, (BACKEND, *map(cut, matrices[:4]), None, cu, 0.7, o, None)),
        ],
    }  # fmt: skip


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def cut(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
