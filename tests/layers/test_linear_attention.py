"""What holds for every mixer on gated linear attention: pieces, packing, padding, formats, gradients."""

from itertools import pairwise

import pytest
import torch

from flash_gsa import HGRN2, GatedLinearAttention, MultiScaleRetention
from flash_gsa.errors import UsageError
from flash_gsa.layers.linear_attention import LinearAttentionMixer

D = 16
KINDS = {"gla": GatedLinearAttention, "hgrn2": HGRN2, "retnet": MultiScaleRetention}
OPTIONS = [{}, {"num_kv_heads": 2, "expand_k": 0.5}, {"use_short_conv": True, "num_kv_heads": 1}]
VARIANTS = [(kind, options) for kind in KINDS for options in OPTIONS]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

each = pytest.mark.parametrize(
    ("kind", "options"), VARIANTS, ids=[",".join([k, *(f"{n}={v}" for n, v in o.items())]) for k, o in VARIANTS]
)


def layer(kind: str, **options) -> LinearAttentionMixer:
    torch.manual_seed(0)
    made = KINDS[kind](D, **{"num_heads": 4, **options})
    with torch.no_grad():  # large enough that gates differ
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def extra(kind: str, mixer: LinearAttentionMixer) -> dict:
    """What a model would give to the mixer."""
    if kind != "hgrn2":
        return {}
    return {"lower_bound": torch.linspace(0.1, 0.9, mixer.kv_key_dim, dtype=mixer.o_proj.weight.dtype)}


def inputs(B=2, T=70):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


@each
@pytest.mark.parametrize("bounds", [(0, 70), (0, 1, 70), (0, 30, 31, 32, 70), tuple(range(71))])
def test_pieces_through_a_cache_are_one_pass(kind, options, bounds):
    mixer, x, cache = layer(kind, **options), inputs(), {}
    more = extra(kind, mixer)
    pieces = [mixer(x[:, a:b], cache=cache, **more) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x, **more), **CLOSE)
    assert cache[0]["state"].shape == (2, mixer.num_kv_heads, mixer.head_k_dim, mixer.head_v_dim)


@each
def test_packed_is_a_loop_over_sequences(kind, options):
    mixer, x = layer(kind, **options), inputs(B=1)
    more = extra(kind, mixer)
    bounds = [0, 2, 2, 40, 41, 70]
    packed = mixer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **more)
    for a, b in pairwise(bounds):
        torch.testing.assert_close(packed[:, a:b], mixer(x[:, a:b], **more), **CLOSE)


@each
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_nothing(kind, options, side):
    if side == "inside" and options.get("use_short_conv"):
        pytest.skip("a convolution counts positions, so padding inside is not nothing to it")
    mixer, x = layer(kind, **options), inputs()
    more = extra(kind, mixer)
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, {"left": slice(0, 9), "right": slice(-9, None), "inside": slice(30, 39)}[side]] = 0
    y = mixer(x, attention_mask=mask, **more)
    torch.testing.assert_close(y[0], mixer(x[:1], **more)[0], **CLOSE)
    real = mask[1].bool()
    torch.testing.assert_close(y[1, real], mixer(x[1:, real], **more)[0], **CLOSE)
    loud = x.clone()
    loud[1, ~real] = float("nan")
    assert torch.equal(mixer(loud, attention_mask=mask.bool(), **more)[1, real], y[1, real])


@each
def test_padding_leaves_the_state_as_it_is(kind, options):
    mixer, x, cache = layer(kind, **options), inputs(), {}
    mixer(x, cache=cache, **extra(kind, mixer))
    before = cache[0]["state"]
    for length in (1, 5):
        mixer(x[:, :length], attention_mask=torch.zeros(2, length), cache=cache, **extra(kind, mixer))
        assert torch.equal(cache[0]["state"], before)


@each
@pytest.mark.parametrize("later", [1, 30])
def test_going_on_after_left_padding(kind, options, later):
    mixer, x, cache = layer(kind, **options), inputs(), {}
    more = extra(kind, mixer)
    mask = torch.ones(2, 40)
    mask[1, :11] = 0
    mixer(x[:, :40], attention_mask=mask, cache=cache, **more)
    y = mixer(x[:, 40 : 40 + later], cache=cache, **more)
    torch.testing.assert_close(y[1:], mixer(x[1:, 11:], **more)[:, 29 : 29 + later], **CLOSE)
    tails = cache[0].get("conv", ())
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in (*tails, cache[0]["state"]))


@each
@pytest.mark.parametrize("later", [1, 30])
def test_going_on_after_right_padding(kind, options, later):
    if kind == "retnet":
        pytest.skip("rotations count positions, padding too")
    mixer, x, cache = layer(kind, **options), inputs(), {}
    more = extra(kind, mixer)
    mask = torch.ones(2, 40)
    mask[1, 29:] = 0
    mixer(x[:, :40], attention_mask=mask, cache=cache, **more)
    y = mixer(x[:, 40 : 40 + later], cache=cache, **more)
    real = torch.cat([mask[1].bool(), torch.ones(later, dtype=torch.bool)])
    torch.testing.assert_close(y[1:], mixer(x[1:, : 40 + later][:, real], **more)[:, 29:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_states_go_on_packed_and_as_a_batch(kind):
    mixer, x, cache = layer(kind), inputs(B=1), {}
    more = extra(kind, mixer)
    mixer(x[:, :50], cu_seqlens=torch.tensor([0, 20, 50]), cache=cache, **more)
    after = mixer(x[:, 50:51], cu_seqlens=torch.tensor([0, 0, 1]), cache=dict(cache), **more)
    together = torch.cat([x[:, 50:51], x[:, 50:51]])
    torch.testing.assert_close(after[0], mixer(together, cache=cache, **more)[1], **CLOSE)
    want = mixer(torch.cat([x[:, 20:50], x[:, 50:51]], 1), **more)[:, -1:]
    torch.testing.assert_close(after, want, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_tails_of_packed_sequences_are_not_kept(kind):
    with pytest.raises(UsageError, match="cannot carry a cache over packed sequences; run them one at a time"):
        layer(kind, use_short_conv=True)(inputs(B=1), cu_seqlens=torch.tensor([0, 20, 70]), cache={})


@each
def test_an_entry_of_the_cache_is_replaced_not_changed(kind, options):
    mixer, x, cache = layer(kind, **options), inputs(), {}
    mixer(x, cache=cache)
    before, copy = cache[0], cache[0]["state"].clone()
    mixer(x[:, :1], cache=cache)
    mixer(x, cache=cache)
    assert before is not cache[0]
    assert torch.equal(before["state"], copy)


@each
def test_a_prefix_does_not_depend_on_what_follows_by_a_bit(kind, options):
    mixer, x = layer(kind, **options), inputs()
    changed = x.clone()
    changed[:, 33:] = 5.0
    y, other = mixer(x, **extra(kind, mixer)), mixer(changed, **extra(kind, mixer))
    assert torch.equal(y[:, :33], other[:, :33])
    assert not torch.equal(y[:, 33:], other[:, 33:])


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats(kind, options, dtype):
    mixer, x = layer(kind, **options), inputs()
    want = mixer(x)
    other, cache = mixer.to(dtype), {}
    got = other(x.to(dtype), cache=cache)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == dtype
    assert cache[0]["state"].dtype == wide
    assert other.project(x.to(dtype))[3].dtype == wide
    error = (got.double() - want.double()).norm() / want.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)


@each
def test_gradients_agree_with_finite_differences(kind, options):
    mixer = layer(kind, **options).double()
    x, more = inputs(B=1, T=5).double(), extra(kind, mixer)
    names = [name for name, _ in mixer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(mixer, given, (x,), more).sum(-1)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_map": "swich"}, "feature_map='swich' is not known; choose one of swish.*Did you mean 'swish'"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"num_heads": 0}, "num_kv_heads must divide"),
        ({"num_heads": 3}, r"hidden_size · expand_k = \d+ must be a positive multiple of num_heads = 3"),
        ({"expand_v": 0.1}, r"hidden_size · expand_v = 2 must be"),
        ({"use_short_conv": True, "conv_size": 1}, "conv_size must be at least 2, got 1; use_short_conv=False"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind, change, words):
    with pytest.raises(UsageError, match=words):
        layer(kind, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 2},
        {"num_kv_heads": 2},
        {"expand_k": 2.0},
        {"expand_v": 0.5},
        {"feature_map": "relu"},
        {"use_short_conv": True},
        {"use_short_conv": True, "conv_size": 3},
        {"elementwise_affine": False},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_an_effect(kind, change):
    before = layer(kind, **({"use_short_conv": True} if "conv_size" in change else {}))
    after = layer(kind, **change)
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
