"""The HGRN2 layer: its equations token by token, its gates' accuracy, the lower bounds of a model's layers."""

import math

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import HGRN2
from flash_gsa.layers.hgrn2 import gates, lower_bounds

D = 16


def layer(**options) -> HGRN2:
    torch.manual_seed(0)
    made = HGRN2(D, **{"num_heads": 4, **options}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return made


def inputs():
    return torch.randn(2, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_is_its_recurrence(kv_heads, bounded):
    mixer = layer(num_kv_heads=kv_heads, norm_eps=1e-3)
    w, x = dict(mixer.named_parameters()), inputs()
    bound = torch.rand(kv_heads * 4, dtype=torch.float64) if bounded else None
    beta = 0.0 if bound is None else bound.view(kv_heads, 4)
    q = F.silu(x @ w["q_proj.weight"].T).view(2, 40, 4, 4)
    f = beta + (1 - beta) * torch.sigmoid((x @ w["f_proj.weight"].T).view(2, 40, kv_heads, 4))
    v = (x @ w["i_proj.weight"].T).view(2, 40, kv_heads, 4)

    state, outputs = torch.zeros(2, kv_heads, 4, 4, dtype=torch.float64), []
    for t in range(40):
        state = f[:, t, :, :, None] * state + (1 - f)[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(4 // kv_heads, 1)) / 2)
    o = torch.stack(outputs, 1).flatten(-2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w["g_norm.weight"]
    torch.testing.assert_close(mixer(x, lower_bound=bound), o @ w["o_proj.weight"].T, rtol=1e-10, atol=1e-10)


def test_parameters_have_the_published_names_and_shapes():
    with torch.device("meta"):
        plain, convolved = HGRN2(2048), HGRN2(2048, use_short_conv=True)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    square = {f"{part}_proj.weight": (2048, 2048) for part in "qfio"}
    assert shapes == square | {"g_norm.weight": (2048,)}
    convolutions = convolved.state_dict().keys() - shapes.keys()
    assert convolutions == {"q_conv1d.weight", "f_conv1d.weight", "i_conv1d.weight"}


def test_convolutions_have_no_activation_of_their_own():
    mixer = layer(use_short_conv=True)
    with torch.no_grad():
        for part in "qfi":
            getattr(mixer, f"{part}_conv1d").weight.copy_(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))
    plain = layer()
    plain.load_state_dict({name: p for name, p in mixer.state_dict().items() if "conv" not in name})
    torch.testing.assert_close(mixer(inputs()), plain(inputs()))


@pytest.mark.parametrize("bound", [None, 1e-30, 1e-6, 0.3, 0.999, 1.0])
def test_gates_are_accurate_at_both_ends(bound):
    x = torch.cat([torch.linspace(-200, 200, 401), torch.tensor([-1e30, -1e4, 1e4, 1e30])]).requires_grad_()
    beta = None if bound is None else torch.full_like(x, bound).requires_grad_()
    g, k = gates(x, beta)
    (g.clamp(min=-1e3).sum() + k.sum()).backward()
    assert (g <= 0).all()
    assert (k >= 0).all()
    assert x.grad.isfinite().all()
    assert beta is None or beta.grad.isfinite().all()

    moderate = x.detach().abs() <= 80  # beyond that, 1 - f is less than float32 has
    y = x.detach()[moderate].double()
    b = 0.0 if bound is None else float(torch.tensor(bound))
    want_k = (1 - b) * torch.sigmoid(-y)
    below_half = torch.logaddexp(torch.tensor(b).double().log(), math.log1p(-b) + F.logsigmoid(y)) if b < 1 else 0 * y
    want_g = torch.where(want_k < 0.5, torch.log1p(-want_k), below_half)
    torch.testing.assert_close(k[moderate].double(), want_k, rtol=1e-5, atol=1e-36)
    torch.testing.assert_close(g[moderate].double(), want_g, rtol=1e-5, atol=1e-36)


def test_lower_bounds_grow_with_depth_and_the_first_is_nothing():
    torch.manual_seed(0)
    first, *others = lower_bounds(torch.randn(6, 5))
    assert first is None
    bounds = torch.stack([torch.zeros(5), *others])
    assert (bounds.diff(dim=0) > 0).all()
    assert (bounds < 1).all()
    for i, bound in enumerate(lower_bounds(torch.zeros(4, 5))[1:], start=1):
        torch.testing.assert_close(bound, torch.full((5,), i / 4))
    assert lower_bounds(torch.zeros(1, 5)) == [None]


def test_lower_bounds_are_the_cumulated_softmax_less_its_first_layer():
    logits = torch.randn(6, 5, dtype=torch.float64)
    shares = logits.exp() / logits.exp().sum(0)
    want = shares.cumsum(0) - shares[0]
    torch.testing.assert_close(torch.stack(lower_bounds(logits)[1:]), want[1:])


@pytest.mark.parametrize("logits", [torch.tensor([[60.0], [0.0], [-20.0]]), torch.tensor([[-60.0], [0.0], [60.0]])])
def test_extreme_lower_bounds_have_finite_gradients(logits):
    logits.requires_grad_()
    for bound in lower_bounds(logits)[1:]:
        assert (bound > 0).all()
        assert (bound <= 1).all()
        g, k = gates(torch.linspace(-50, 50, 11), bound)
        (g.sum() + k.sum()).backward(retain_graph=True)
    assert logits.grad.isfinite().all()
