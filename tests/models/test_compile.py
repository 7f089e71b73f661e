"""Whole models under torch.compile: one graph forward and backward, for all lengths, with what eager mode gives."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flash_gsa import GSAForCausalLM

EPS = torch.finfo(torch.float32).eps
ONE_LAYER = {"num_hidden_layers": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(function):
    """`function` traced forward and backward, each operation run as PyTorch has it."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def step(forward, model: GSAForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The loss, and the gradient of every parameter."""
    loss = forward(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any], units: int = 64) -> None:
    """Equal up to `units` of float32 in the last place of the norm: operations may be composed of others."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if want is None:
            assert found[name] is None, name
        else:
            assert (found[name] - want).norm() <= units * EPS * want.norm(), name


def batch(T: int, padded: bool = False) -> dict[str, Tensor]:
    """Two rows; the first padded on the left by three."""
    inputs = {"input_ids": torch.randint(3, 50, (2, T))}
    if padded:
        inputs["attention_mask"] = (torch.arange(T) >= torch.tensor([[3], [0]])).long()
    return inputs


def packed(T: int, sequences: int = 3) -> dict[str, Tensor]:
    """Of several sequences: one empty, some of a single token, the last long."""
    starts = torch.arange(sequences) - 1
    return {
        "input_ids": torch.randint(3, 50, (1, T)),
        "cu_seqlens": torch.cat([starts.clamp(min=0), starts.new_tensor([T])]),
    }


def with_dynamic_lengths(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs`, for which a graph must serve any length and any number of sequences."""
    for name, x in inputs.items():
        torch._dynamo.mark_dynamic(x, 0 if name == "cu_seqlens" else 1)
    return inputs


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("batch", {}),
        ("packed", {"use_short_conv": True, "num_kv_heads": 1}),
        ("padded", {"gating": "abc"}),
        ("packed", {"states": "recompute"}),
        ("packed", {"token_mixer": "gla"}),
        ("padded", {"token_mixer": "hgrn2", "num_hidden_layers": 2}),
        ("packed", {"token_mixer": "retnet"}),
        ("batch", {"token_mixer": "attention"}),
        ("packed", {"num_hidden_layers": 2, "attn": {"layers": [1], "window_size": 9, "num_kv_heads": 1}}),
    ],
    ids=str,
)
def test_one_graph_serves_all_lengths(tiny, graphs, settings, layout):
    model = tiny(**ONE_LAYER | settings).train()
    forward = compiled(model)
    for T, sequences in ((30, 3), (70, 2), (41, 5), (129, 4), (17, 3)):
        inputs = packed(T, sequences) if layout == "packed" else batch(T, padded=layout == "padded")
        wanted = step(model, model, inputs)
        assert_same(step(forward, model, with_dynamic_lengths(inputs)), wanted)
    assert graphs() == 1


def test_packed_sequences_where_the_graph_depends_on_the_lengths(tiny):
    model, inputs = tiny(**ONE_LAYER, gating="abc").train(), packed(30)
    assert_same(step(compiled(model), model, inputs), step(model, model, inputs))


def test_lengths_that_nobody_marked_take_two_graphs(tiny, graphs):
    model = tiny(**ONE_LAYER).train()
    forward = compiled(model)
    for T in (30, 70, 17):
        inputs = batch(T)
        assert_same(step(forward, model, inputs), step(model, model, inputs))
    assert graphs() <= 2


def test_autocast(tiny):
    model, inputs = tiny(**ONE_LAYER).train(), batch(30)

    def forward(**z):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**z)

    assert_same(step(compiled(forward), model, inputs), step(forward, model, inputs))


def test_checkpointed_blocks(tiny):
    model, inputs = tiny(**ONE_LAYER).train(), batch(30)
    wanted = step(model, model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for forward in (model, compiled(model)):
        assert_same(step(forward, model, inputs), wanted)


def test_a_checkpointed_layer(tiny):
    model, inputs = tiny(**ONE_LAYER).train(), batch(30)
    wanted = step(model, model, inputs)
    mixer = model.model.layers[0].attn
    plain = mixer.forward
    mixer.forward = lambda x, **options: checkpoint(plain, x, use_reentrant=False, **options)
    for forward in (model, compiled(model)):
        assert_same(step(forward, model, inputs), wanted)


def test_decoding(tiny):
    """Prefill, then token after token with the cache that the compiled model returned."""
    model = tiny(**ONE_LAYER)
    forward = compiled(model)
    pieces = [torch.randint(3, 50, (2, T)) for T in (30, 1, 1, 1)]
    with torch.no_grad():
        caches = [None, None]
        for ids in pieces:
            found = forward(ids, past_key_values=caches[0], use_cache=True)
            wanted = model(ids, past_key_values=caches[1], use_cache=True)
            caches = [found.past_key_values, wanted.past_key_values]
            torch.testing.assert_close(found.logits, wanted.logits, rtol=64 * EPS, atol=64 * EPS)
    assert caches[0].get_seq_length() == 33


ON_A_GPU = {"hidden_size": 128, "num_heads": 2, "num_slots": 32, "intermediate_size": 256, "initializer_range": 0.1}
RECURRENT = [{}, {"gating": "abc"}, {"token_mixer": "gla", "expand_k": 1.0}, {"token_mixer": "hgrn2"}]
RECURRENT += [{"token_mixer": "retnet", "expand_v": 1.0}]
SOFTMAX = [{"token_mixer": "attention"}, {"attn": {"layers": [1]}}]
# Tokens; sequences, where they are packed. Fewer than two chunks take graphs of their own: tests/ops/test_compile.py.
LENGTHS = ((300, 3), (260, 2), (421, 5))


def on_a_gpu(tiny, **settings) -> GSAForCausalLM:
    """Skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tiny(**ON_A_GPU | settings).train().cuda()


def gpu_inputs(layout: str, T: int, sequences: int = 3, boundaries: str = "cuda") -> dict[str, Tensor]:
    """Of packed sequences the boundaries lie on the device `boundaries`."""
    inputs = packed(T, sequences) if layout == "packed" else batch(T, padded=layout == "padded")
    return {name: x.to(boundaries if name == "cu_seqlens" else "cuda") for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("settings", RECURRENT + SOFTMAX, ids=str)
def test_one_graph_serves_all_lengths_on_a_gpu(tiny, graphs, settings, layout):
    """Triton's operators and, beside them, plain operations where eager mode has fused kernels."""
    model = on_a_gpu(tiny, **settings)
    forward = compiled(model)
    for T, sequences in LENGTHS:
        # Softmax attention reads the boundaries on the host.
        inputs = gpu_inputs(layout, T, sequences, boundaries="cpu" if settings in SOFTMAX else "cuda")
        wanted = step(model, model, inputs)
        assert_same(step(forward, model, with_dynamic_lengths(inputs)), wanted, units=256)
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["packed", "batch"])
def test_lengths_that_nobody_marked_take_two_graphs_on_a_gpu(tiny, graphs, layout):
    model = on_a_gpu(tiny)
    forward = compiled(model)
    for T, sequences in LENGTHS:
        step(forward, model, gpu_inputs(layout, T, sequences))
    assert graphs() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("settings", RECURRENT, ids=str)
def test_checkpointed_blocks_on_a_gpu(tiny, settings, mode):
    """The same bits as without checkpoints. (Softmax attention's backward sums in no fixed order.)"""
    model, inputs = on_a_gpu(tiny, **settings).bfloat16(), gpu_inputs("packed", 300)
    wrap = compiled if mode == "compiled" else lambda function: function
    wanted = step(wrap(model), model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    found = step(wrap(model), model, inputs)
    for name, want in wanted.items():
        assert torch.equal(found[name], want), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "settings"), [("packed", {"gating": "abc"}), ("batch", {}), ("batch", {"token_mixer": "gla"})], ids=str
)
def test_inductor_in_bfloat16(tiny, graphs, layout, settings):
    """One graph for all lengths, as near to the same model in float32 as eager mode is.

    Of a vocabulary that is no multiple of 8 PyTorch may pad the product, if it times that as faster, and then takes one
    length only: docs/design.md."""
    wide = on_a_gpu(tiny, vocab_size=56, **settings)
    model = deepcopy(wide).bfloat16()
    forward = torch.compile(model, fullgraph=True)
    for T, sequences in LENGTHS:
        inputs = gpu_inputs(layout, T, sequences)
        exact, usual = step(wide, wide, inputs), step(model, model, inputs)
        found = step(forward, model, with_dynamic_lengths(inputs))
        for name, want in exact.items():
            error, allowed = (found[name] - want).norm(), 2 * (usual[name] - want).norm()
            assert error <= allowed + 2**-8 * want.norm(), name
    assert graphs() == 1
