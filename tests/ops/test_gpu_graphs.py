"""The operators on a GPU inside of other machinery: torch.compile, CUDA graphs, a second GPU; nothing waits."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_gsa import abc_gates, gated_linear_attention, gated_slot_attention

from . import test_linear as linear
from .helpers import Case, Tensors, make, rounded, skip_unless_able
from .judge import CUDA, distance

pytest.importorskip("triton", reason="triton is not installed (CUDA builds of torch bring it)")

from flash_gsa.ops.triton.step import triton_step

pytestmark = pytest.mark.gpu

BATCH = Case(T=150, HQ=4, H=2, K=64, V=64, M=32, scale=0.7)
PACKED = replace(BATCH, B=1, lengths=(0, 100, 3, 0, 47))
LONG = replace(BATCH, B=1, T=2500, HQ=1, H=1)  # in several segments
NEAR = 4 * torch.finfo(torch.bfloat16).eps  # what fusing two roundings into one may move


@pytest.fixture(autouse=True)
def _on_a_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def slots(q, k, v, g, hk, hv, cu_seqlens=None, backend="triton", **options) -> tuple[Tensor, ...]:
    """o and the final states."""
    o, state = gated_slot_attention(
        q, k, v, g,
        scale=0.7, initial_state=(hk, hv), output_final_state=True, cu_seqlens=cu_seqlens, backend=backend, **options,
    )  # fmt: skip
    assert state is not None
    return o, *state


def matrix(q, k, v, g, state, cu_seqlens=None, backend="triton") -> tuple[Tensor, ...]:
    """o and the final state of gated linear attention."""
    o, final = gated_linear_attention(
        q, k, v, g, scale=0.7, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    assert final is not None
    return o, final


def inputs(operator, case: Case, seed: int = 0, device: torch.device | str = CUDA) -> Tensors:
    """Leaves for `operator` in bfloat16 on `device`; skips the test where the kernels are not offered."""
    x = rounded(make(case, seed) if operator is slots else linear.make(case, seed), torch.bfloat16)
    x = {name: tensor.to(device).requires_grad_() for name, tensor in x.items()}
    if operator is slots:
        skip_unless_able("triton", x, case)
    else:
        linear.call("triton", x, case)
    return x


def bounds(case: Case, device=CUDA) -> Tensor | None:
    return None if case.lengths is None else case.cu_seqlens.to(device)


def results(function, x: Tensors, **options) -> list[Tensor]:
    """What `function` returns, and the gradients of all inputs for outgoing ones that are the results themselves."""
    outputs = function(**x, **options)
    gradients = torch.autograd.grad(outputs, list(x.values()), [y.detach() for y in outputs])
    return [y.detach().clone() for y in (*outputs, *gradients)]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for i, (y, want) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(y, want.to(y.device)), i


ALL = [(slots, BATCH), (slots, PACKED), (slots, LONG), (matrix, BATCH), (matrix, PACKED)]
NAMES = ["slots-batch", "slots-packed", "slots-long", "linear-batch", "linear-packed"]
everything = pytest.mark.parametrize(("operator", "case"), ALL, ids=NAMES)


@everything
def test_one_compiled_graph_gives_the_same_bits(operator, case):
    x, cu = inputs(operator, case), bounds(case)
    wanted = results(operator, x, cu_seqlens=cu)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, x, cu_seqlens=cu), wanted)
    if operator is slots:
        assert_same_bits(results(compiled, x, cu_seqlens=cu, states="recompute"), wanted)


@pytest.mark.parametrize(("operator", "case"), [(slots, PACKED), (matrix, BATCH)], ids=["slots", "linear"])
def test_inductor_between_other_operations(operator, case):
    """Inductor may choose where results of others lie in memory."""

    def layer(cu_seqlens, **z):
        z["q"] = torch.nn.functional.silu(z["q"].transpose(1, 2)).transpose(1, 2)
        o, *states = operator(**z, cu_seqlens=cu_seqlens)
        return (o.transpose(1, 2).sin(), *states)

    x, cu = inputs(operator, case), bounds(case)
    wanted = results(layer, x, cu_seqlens=cu)
    found = results(torch.compile(layer, fullgraph=True), x, cu_seqlens=cu)
    for i, (y, want) in enumerate(zip(found, wanted, strict=True)):
        assert distance(y, want) < NEAR, i


@pytest.mark.parametrize("backend", ["triton", "chunk"])
def test_compiled_into_cuda_graphs(backend):
    """`chunk` looks at its gates, so it must stay outside of them."""

    def layer(**z):
        o, hk, hv = slots(**z, backend=backend)
        return o.sin(), hk, hv

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # the first ones only warm up and record
        x = inputs(slots, BATCH, seed)
        torch.compiler.cudagraph_mark_step_begin()
        for i, (y, want) in enumerate(zip(results(compiled, x), results(layer, x), strict=True)):
            assert distance(y, want) < NEAR, (seed, i)


@everything
def test_a_captured_graph_replays_with_other_inputs(operator, case):
    x, cu = inputs(operator, case), bounds(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(operator, x, cu_seqlens=cu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(operator, x, cu_seqlens=cu)
    for seed in (1, 2):
        other = inputs(operator, case, seed)
        with torch.no_grad():
            for name, leaf in x.items():
                leaf.copy_(other[name])
        graph.replay()
        assert_same_bits(found, results(operator, other, cu_seqlens=cu))


@everything
def test_nothing_waits_for_the_device(operator, case):
    x, logits = inputs(operator, case), torch.randn(1, case.T, 2, 32, device=CUDA)
    for device in ("cpu",) if case.lengths is None else ("cpu", "cuda"):
        cu = bounds(case, device)

        def call(cu=cu):
            found = results(operator, x, cu_seqlens=cu)
            return [*found, *(() if cu is None else abc_gates(logits, cu_seqlens=cu))]

        wanted = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = call()
            with pytest.raises(RuntimeError, match="synchroniz"):
                logits.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(found, wanted)


@everything
def test_deterministic_algorithms_and_filled_memory(operator, case):
    """PyTorch then refuses what is not deterministic, and fills memory that was not written with NaN."""
    x, cu = inputs(operator, case), bounds(case)
    wanted = results(operator, x, cu_seqlens=cu)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=CUDA).isnan().all()
        found = results(operator, x, cu_seqlens=cu)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(found, wanted)


@everything
def test_on_another_device_than_the_current_one(operator, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    wanted = results(operator, inputs(operator, case), cu_seqlens=bounds(case))
    x, cu = inputs(operator, case, device="cuda:1"), bounds(case, "cuda:1")
    found = results(operator, x, cu_seqlens=cu)
    assert {y.device for y in found} == {torch.device("cuda:1")}
    assert_same_bits(found, wanted)
    assert_same_bits(results(torch.compile(operator, fullgraph=True, backend="aot_eager"), x, cu_seqlens=cu), wanted)
    assert torch.cuda.current_device() == 0


def test_a_step_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for device in ("cuda:0", "cuda:1"):
        x = {name: y.detach() for name, y in inputs(slots, BATCH, device=device).items()}
        o, state = triton_step(*(x[name][:, 0] for name in "qkvg"), None, (x["hk"], x["hv"]), 0.7)
        found.append([o, *state])
    assert_same_bits(found[1], found[0])
