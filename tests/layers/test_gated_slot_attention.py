"""The GSA layer: its equations, every option, padding, packing, pieces."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import GatedSlotAttention, gated_slot_attention
from flash_gsa.errors import UsageError

D = 16
GATINGS = [{}, {"gating": "data_independent"}, {"gating": "abc"}, {"gate_source": "pooled_keys"}]
GATINGS += [{"gating": "abc", "gate_source": "pooled_keys"}]
VARIANTS = [gating | conv for gating in GATINGS for conv in ({}, {"use_short_conv": True})]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def name_of(options: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def layer(**options) -> GatedSlotAttention:
    torch.manual_seed(0)
    made = GatedSlotAttention(D, **{"num_heads": 4, "num_slots": 6, **options})
    with torch.no_grad():  # large enough that the softmax and the gates are not nearly uniform
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def inputs(B=2, T=70):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def test_is_its_equations():
    mixer = layer(num_kv_heads=2, gate_logit_normalizer=4.0, norm_eps=1e-3)
    x = inputs()
    q = F.silu(x @ mixer.q_proj.weight.T).view(2, 70, 4, 4)
    k = F.silu(x @ mixer.k_proj.weight.T).view(2, 70, 2, 4)
    v = F.silu(x @ mixer.v_proj.weight.T).view(2, 70, 2, 4)
    g = F.logsigmoid(x @ mixer.f_proj.weight.T).view(2, 70, 2, 6) / 4
    o, _ = gated_slot_attention(q, k, v, g, 1 - g.exp(), backend="reference")
    o = F.silu(o.flatten(-2))
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * mixer.g_norm.weight
    torch.testing.assert_close(mixer(x), normed @ mixer.o_proj.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 2},
        {"num_kv_heads": 2},
        {"num_slots": 5},
        {"expand_k": 0.5},
        {"expand_v": 2.0},
        {"feature_map": "relu"},
        {"feature_map": "identity"},
        {"feature_map": "softmax"},
        {"value_activation": "identity"},
        {"output_activation": "identity"},
        {"gating": "data_independent"},
        {"gating": "abc"},
        {"gate_source": "pooled_keys"},
        {"gate_logit_normalizer": 2.0},
        {"use_short_conv": True},
        {"use_short_conv": True, "conv_size": 3},
        {"use_norm": False},
        {"elementwise_affine": False},
        {"norm_eps": 0.1},
    ],
    ids=name_of,
)
def test_every_option_has_an_effect(change):
    before = layer(**({"use_short_conv": True} if "conv_size" in change else {}))
    after = layer(**change)
    shapes = [{name: p.shape for name, p in mixer.named_parameters()} for mixer in (before, after)]
    if shapes[0] == shapes[1]:
        after.load_state_dict(before.state_dict())
        assert not torch.allclose(before(inputs()), after(inputs()), atol=1e-3)
    y = after(inputs())
    assert y.shape == (2, 70, D)
    y.square().sum().backward()
    for name, parameter in after.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} gets no gradient"


@pytest.mark.parametrize("options", [{}, {"gating": "abc"}, {"use_short_conv": True, "num_kv_heads": 2}], ids=name_of)
def test_states_that_are_computed_again_take_less_and_give_the_same(options):
    kept, found = {}, {}
    for states in ("keep", "recompute"):
        mixer, sizes = layer(states=states, **options), {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = mixer(inputs())
        kept[states] = sum(sizes.values())
        y.square().sum().backward()
        found[states] = {"y": y} | {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert kept["recompute"] < 0.7 * kept["keep"]
    for name, want in found["keep"].items():
        assert torch.equal(found["recompute"][name], want), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_map": "swich"}, "feature_map='swich' is not known; choose one of swish.*Did you mean 'swish'"),
        ({"value_activation": "relu"}, "value_activation='relu' is not known; choose one of swish, identity"),
        ({"output_activation": "x"}, "output_activation='x' is not known"),
        ({"gating": "gas"}, "gating='gas' is not known.*Did you mean 'gsa'"),
        ({"gate_source": "pooled_key"}, "gate_source='pooled_key' is not known.*Did you mean 'pooled_keys'"),
        ({"states": "kept"}, "states='kept' is not known; choose one of keep, recompute.*Did you mean 'keep'"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"num_kv_heads": 0}, "num_kv_heads must divide"),
        ({"num_heads": 0}, "num_kv_heads must divide"),
        ({"num_heads": 3}, r"hidden_size · expand_k = 16 must be a positive multiple of num_heads = 3"),
        ({"expand_v": 0.1}, r"hidden_size · expand_v = 2 must be"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer must be above 0, got 0.0"),
        ({"gate_logit_normalizer": float("nan")}, "gate_logit_normalizer must be above 0"),
        ({"gating": "data_independent", "gate_source": "pooled_keys"}, "reads no input, so gate_source='pooled_keys'"),
        ({"use_short_conv": True, "conv_size": 1}, "conv_size must be at least 2, got 1; use_short_conv=False"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        layer(**change)


@pytest.mark.parametrize("tau", [1.0, 8.0, 16.0])
@pytest.mark.parametrize("slots", [1, 2, 10, 64])
def test_data_independent_gates_start_with_the_stated_memory_lengths(slots, tau):
    mixer = GatedSlotAttention(
        D, num_heads=4, num_slots=slots, num_kv_heads=2, gating="data_independent", gate_logit_normalizer=tau
    )
    _, _, _, g, s = mixer.project(inputs())
    assert g.shape == (2, 70, 2, slots)
    assert s is None
    length = 1 / -torch.expm1(g[0, 0, 0].double())
    want = torch.tensor([2.0 ** (1 + 9 * i / max(slots - 1, 1)) for i in range(slots)], dtype=torch.float64)
    torch.testing.assert_close(length, want, rtol=1e-4, atol=0)
    assert (g == g[:1, :1, :1]).all()


def test_pooled_keys_are_means_of_the_key_projection():
    mixer = layer(gate_source="pooled_keys", num_kv_heads=2, num_slots=2, gate_logit_normalizer=1.0)
    assert not any(name.startswith("f_") for name in mixer.state_dict())
    x = inputs()
    *_, g, _ = mixer.project(x)
    # Two heads of width 4, two slots each: every gate logit is the mean of two numbers.
    logits = (x @ mixer.k_proj.weight.T).view(2, 70, 2, 2, 2).mean(-1)
    torch.testing.assert_close(g, F.logsigmoid(logits))


def test_abc_forgets_only_what_it_writes():
    *_, g, s = layer(gating="abc").project(inputs())
    torch.testing.assert_close(s[:, 1:], -torch.expm1(g[:, 1:]), rtol=1e-4, atol=1e-6)
    assert (s[:, 0] == 1).all()


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.parametrize("bounds", [(0, 70), (0, 1, 70), (0, 30, 31, 32, 70), tuple(range(71))])
def test_pieces_through_a_cache_are_one_pass(options, bounds):
    mixer, x, cache = layer(**options), inputs(), {}
    whole = mixer(x)
    pieces = [mixer(x[:, a:b], cache=cache) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_packed_is_a_loop_over_sequences(options):
    mixer, x = layer(num_kv_heads=2, **options), inputs(B=1)
    bounds = [0, 2, 2, 40, 41, 70]
    packed = mixer(x, cu_seqlens=torch.tensor(bounds))
    for a, b in pairwise(bounds):
        torch.testing.assert_close(packed[:, a:b], mixer(x[:, a:b]), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_padding_changes_nothing(options, side):
    if side == "inside" and options.get("use_short_conv"):
        pytest.skip("a convolution counts positions, so padding inside is not nothing to it")
    mixer, x = layer(**options), inputs()
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, {"left": slice(0, 9), "right": slice(-9, None), "inside": slice(30, 39)}[side]] = 0
    y = mixer(x, attention_mask=mask)
    torch.testing.assert_close(y[0], mixer(x[:1])[0], **CLOSE)
    real = mask[1].bool()
    torch.testing.assert_close(y[1, real], mixer(x[1:, real])[0], **CLOSE)
    loud = x.clone()
    loud[1, ~real] = 1e3
    torch.testing.assert_close(mixer(loud, attention_mask=mask)[1, real], y[1, real], rtol=0, atol=0)
    assert mixer(loud, attention_mask=mask.bool()).isfinite().all()


@pytest.mark.parametrize("padding", [slice(0, 11), slice(29, 40), slice(1, 40), slice(0, 40)], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_going_on_after_padding(options, padding):
    mixer, x, cache = layer(**options), inputs(), {}
    mask = torch.ones(2, 50)
    mask[1, 10:][padding] = 0
    mixer(x[:, :10], cache=cache)
    mixer(x[:, 10:50], attention_mask=mask[:, 10:], cache=cache)
    later = mixer(x[:, 50:], cache=cache)
    torch.testing.assert_close(later[:1], mixer(x[:1])[:, 50:], **CLOSE)
    real = torch.cat([mask[1].bool(), torch.ones(20, dtype=torch.bool)])
    if options.get("use_short_conv") and padding == slice(0, 11):
        return  # a convolution counts positions: padding inside is not nothing to it
    torch.testing.assert_close(later[1:], mixer(x[1:, real])[:, -20:], **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_going_on_after_left_padding(options):
    mixer, x, cache = layer(**options), inputs(), {}
    mask = torch.ones(2, 40)
    mask[1, :11] = 0
    mixer(x[:, :40], attention_mask=mask, cache=cache)
    later = mixer(x[:, 40:], cache=cache)
    torch.testing.assert_close(later[1:], mixer(x[1:, 11:])[:, 29:], **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_what_is_carried_on_takes_no_more_memory_than_it_says(options):
    mixer, cache = layer(**options), {}
    with torch.no_grad():
        mixer(inputs(), cache=cache)
    entry = cache[0]
    parts = [*entry["state"], *entry.get("conv", ()), *([entry["normalizer"]] if "normalizer" in entry else [])]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


@pytest.mark.parametrize("options", [{}, {"gating": "abc"}], ids=name_of)
def test_packed_states_go_on_packed_and_as_a_batch(options):
    mixer, x, cache = layer(**options), inputs(B=1), {}
    mixer(x[:, :50], cu_seqlens=torch.tensor([0, 20, 50]), cache=cache)
    after = mixer(x[:, 50:51], cu_seqlens=torch.tensor([0, 0, 1]), cache=dict(cache))
    together = torch.cat([x[:, 50:51], x[:, 50:51]])
    torch.testing.assert_close(after[0], mixer(together, cache=cache)[1], **CLOSE)
    want = mixer(torch.cat([x[:, 20:50], x[:, 50:51]], 1))[:, -1:]
    torch.testing.assert_close(after, want, **CLOSE)


def test_tails_of_packed_sequences_are_not_kept():
    with pytest.raises(UsageError, match="cannot carry a cache over packed sequences; run them one at a time"):
        layer(use_short_conv=True)(inputs(B=1), cu_seqlens=torch.tensor([0, 20, 70]), cache={})


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_an_entry_of_the_cache_is_replaced_not_changed(options):
    mixer, x, cache = layer(**options), inputs(), {}
    mixer(x, cache=cache)
    before = dict(cache)
    copies = [part.clone() for part in cache[0]["state"]]
    mixer(x[:, :1], cache=cache)
    mixer(x, cache=cache)
    assert before[0] is not cache[0]
    assert all(torch.equal(a, b) for a, b in zip(before[0]["state"], copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_other_number_formats(options, dtype):
    mixer, x = layer(**options), inputs()
    want = mixer(x)
    other, cache = mixer.to(dtype), {}
    got = other(x.to(dtype), cache=cache)
    assert got.dtype == dtype
    assert cache[0]["state"][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    *_, g, s = other.project(x.to(dtype))
    assert g.dtype == torch.float32
    assert s is None or s.dtype == torch.float32
    error = (got.double() - want.double()).norm() / want.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", GATINGS, ids=name_of)
def test_compiles_without_a_break(options, packed):
    mixer, x = layer(**options), inputs(B=1)
    bounds = torch.tensor([0, 2, 2, 40, 70]) if packed else None
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    found = [], []
    for function, results in zip((compiled, mixer), found, strict=True):
        y = function(x, cu_seqlens=bounds)
        results += [y.detach(), *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
