"""The GLA layer: its equations token by token, its own options, its names."""

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import GatedLinearAttention
from flash_gsa.errors import UsageError

D = 16


def layer(**options) -> GatedLinearAttention:
    torch.manual_seed(0)
    made = GatedLinearAttention(D, **{"num_heads": 4, "gate_low_rank_dim": 3, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return made


def inputs():
    return torch.randn(2, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("feature_map", ["identity", "swish"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_its_recurrence(kv_heads, feature_map):
    mixer = layer(num_kv_heads=kv_heads, feature_map=feature_map, gate_logit_normalizer=2.0, norm_eps=1e-3)
    w, x = dict(mixer.named_parameters()), inputs()
    phi = F.silu if feature_map == "swish" else (lambda y: y)
    q = phi(x @ w["q_proj.weight"].T).view(2, 40, 4, 2)  # keys are half as wide as values
    k = phi(x @ w["k_proj.weight"].T).view(2, 40, kv_heads, 2)
    v = (x @ w["v_proj.weight"].T).view(2, 40, kv_heads, 4)
    logits = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    alpha = torch.sigmoid(logits).sqrt().view(2, 40, kv_heads, 2)

    state, outputs = torch.zeros(2, kv_heads, 2, 4, dtype=torch.float64), []
    for t in range(40):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(4 // kv_heads, 1)) / 2**0.5)
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w["g_norm_swish_gate.weight"]
    o = o.flatten(-2) * F.silu(x @ w["g_proj.weight"].T)
    torch.testing.assert_close(mixer(x), o @ w["o_proj.weight"].T, rtol=1e-10, atol=1e-10)


def test_parameters_have_the_published_names_and_shapes():
    with torch.device("meta"):
        plain, convolved = GatedLinearAttention(1024, num_kv_heads=2), GatedLinearAttention(1024, use_short_conv=True)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    assert shapes == {
        "q_proj.weight": (512, 1024),
        "k_proj.weight": (256, 1024),
        "v_proj.weight": (512, 1024),
        "g_proj.weight": (1024, 1024),
        "gk_proj.0.weight": (16, 1024),
        "gk_proj.1.weight": (256, 16),
        "gk_proj.1.bias": (256,),
        "g_norm_swish_gate.weight": (256,),
        "o_proj.weight": (1024, 1024),
    }
    convolutions = convolved.state_dict().keys() - shapes.keys()
    assert convolutions == {"q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"}


def test_gates_begin_with_a_half_life_of_tau_tokens():
    mixer = GatedLinearAttention(D, num_heads=4, gate_logit_normalizer=5.0)
    *_, g = mixer.project(torch.zeros(1, 3, D))
    torch.testing.assert_close((5 * g).exp(), torch.full((1, 3, 4, 2), 0.5))


@pytest.mark.parametrize("change", [{"gate_logit_normalizer": 2.0}, {"gate_low_rank_dim": 2}], ids=str)
def test_its_options_have_an_effect(change):
    before, after = layer(), layer(**change)
    if "gate_logit_normalizer" in change:
        after.load_state_dict(before.state_dict())
    assert not torch.allclose(before(inputs()), after(inputs()), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer must be above 0, got 0.0"),
        ({"gate_logit_normalizer": float("nan")}, "gate_logit_normalizer must be above 0"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim must be at least 1, got 0"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        layer(**change)
