"""The RetNet layer: its equations token by token, its decays, rotary positions, names."""

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import MultiScaleRetention
from flash_gsa.errors import UsageError
from flash_gsa.layers.retnet import log_decays
from flash_gsa.layers.rotary import count_tokens, rotate, rotation

D = 16


def layer(**options) -> MultiScaleRetention:
    torch.manual_seed(0)
    made = MultiScaleRetention(D, **{"num_heads": 4, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return made


def inputs():
    return torch.randn(2, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_its_definition(kv_heads):
    """Σ_j γ^{t-j} ⟨R_t q_t, R_j k_j⟩ v_j, the rotations as complex numbers."""
    mixer = layer(num_kv_heads=kv_heads, rope_theta=100.0, norm_eps=1e-3)
    w, x = dict(mixer.named_parameters()), inputs()
    time = torch.arange(40, dtype=torch.float64)
    turn = torch.polar(torch.ones(40, 2).double(), time[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64))

    def turned(name, heads):
        y = (x @ w[f"{name}_proj.weight"].T).view(2, 40, heads, 4)
        return torch.complex(y[..., :2], y[..., 2:]) * turn[:, None]

    q, k = turned("q", 4), turned("k", kv_heads).repeat_interleave(4 // kv_heads, 2)
    v = (x @ w["v_proj.weight"].T).view(2, 40, kv_heads, 8).repeat_interleave(4 // kv_heads, 2)
    gamma = (1 - 2.0 ** (-5 - torch.arange(kv_heads, dtype=torch.float64))).repeat_interleave(4 // kv_heads)
    past = time[:, None] - time
    decay = torch.where(past >= 0, gamma[:, None, None] ** past.clamp(min=0), 0.0)
    scores = torch.einsum("bthk,bjhk->bhtj", q, k.conj()).real / 2 * decay
    o = torch.einsum("bhtj,bjhv->bthv", scores, v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w["g_norm_swish_gate.weight"]
    o = o.flatten(-2) * F.silu(x @ w["g_proj.weight"].T)
    torch.testing.assert_close(mixer(x), o @ w["o_proj.weight"].T, rtol=1e-10, atol=1e-10)


def test_parameters_have_the_published_names_and_shapes():
    with torch.device("meta"):
        plain, convolved = MultiScaleRetention(2048), MultiScaleRetention(2048, use_short_conv=True)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    assert shapes == {
        "q_proj.weight": (2048, 2048),
        "k_proj.weight": (2048, 2048),
        "v_proj.weight": (4096, 2048),
        "g_proj.weight": (4096, 2048),
        "g_norm_swish_gate.weight": (512,),
        "o_proj.weight": (2048, 4096),
    }
    convolutions = convolved.state_dict().keys() - shapes.keys()
    assert convolutions == {"q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decays_of_the_heads(dtype):
    found = log_decays(8, torch.zeros(1, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.exp().double(), torch.tensor([1 - 2 ** (-5 - h) for h in range(8)]).double())


def test_positions_are_counted_on_through_the_cache():
    mixer, x, cache = layer(), inputs(), {}
    mask = torch.ones(2, 10)
    mask[1, :4] = 0
    mixer(x[:, :10], attention_mask=mask, cache=cache)
    assert cache[0]["seen"].tolist() == [10, 6]
    mixer(x[:, 10:11], cache=cache)
    assert cache[0]["seen"].tolist() == [11, 7]


def test_far_positions_are_exact():
    x = torch.randn(1, 2, 1, 8)
    near = rotate(x, *rotation(torch.tensor([0, 3]), 8, 10000.0))
    far = rotate(x, *rotation(torch.tensor([3_000_000, 3_000_003]), 8, 10000.0))
    torch.testing.assert_close((near[:, 0] * near[:, 1]).sum(), (far[:, 0] * far[:, 1]).sum(), rtol=1e-5, atol=1e-5)


def test_tokens_are_counted_without_padding_and_by_sequence():
    x = torch.zeros(2, 4, 1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]])
    place, seen = count_tokens(x, torch.tensor([5, 0]), mask, None)
    assert place[mask.bool()].tolist() == [5, 6, 7, 0, 1]
    assert seen.tolist() == [8, 2]
    place, seen = count_tokens(x, 7, None, None)
    assert (place.tolist(), seen) == ([7, 8, 9, 10], 11)
    place, seen = count_tokens(x[:1], torch.tensor([10, 20, 30]), None, torch.tensor([0, 3, 3, 4]))
    assert place.tolist() == [10, 11, 12, 30]
    assert seen.tolist() == [13, 20, 31]


def test_rope_theta_has_an_effect():
    assert not torch.allclose(layer()(inputs()), layer(rope_theta=10.0)(inputs()), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 16}, r"hidden_size · expand_k = 16 must be a multiple of 2·num_heads = 32"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0.0"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        layer(**change)
