"""What the slots are said to do is what the operator does."""

import numpy as np
import pytest
import torch

from flash_gsa.errors import UsageError
from flash_gsa.inspection import gsa_layers, slot_activities, slot_activity
from flash_gsa.inspection.slots import _follow
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.ops import gated_slot_attention

IDS = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def make_model(**settings) -> GSAForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "num_slots": 6}
    return GSAForCausalLM(GSAConfig(**sizes, initializer_range=0.5, **settings)).eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_kv_heads": 2}, {"gating": "abc"}, {"use_short_conv": True, "gating": "data_independent"}],
    ids=["plain", "grouped heads", "abc", "data-independent, convolution"],
)
def test_attention_times_values_is_what_the_operator_gives(settings):
    model = make_model(**settings)
    captured = {}

    def keep(module, args, kwargs, output):
        captured["inputs"] = module.project(args[0])

    hook = model.model.layers[1].attn.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([IDS]))
    hook.remove()
    q, k, v, g, s = captured["inputs"]
    expected, _ = gated_slot_attention(q, k, v, g, s, backend="reference")
    for activity in slot_activities(model, IDS, layers=[1]):
        kv_head = activity.head // (q.shape[2] // k.shape[2])
        got = activity.attention @ v[0, :, kv_head].double().numpy()
        np.testing.assert_allclose(got, expected[0, :, activity.head].numpy(), rtol=1e-4, atol=1e-5)


def test_shares_are_shares():
    for a in slot_activities(make_model(), IDS):
        np.testing.assert_allclose(a.read.sum(1), 1, rtol=1e-12)
        assert ((a.keep >= 0) & (a.keep <= 1)).all()
        np.testing.assert_allclose(a.write, 1 - a.keep, atol=1e-6)
        assert (a.attention >= 0).all()
        assert not np.triu(a.attention, 1).any()
        # What is missing to 1 is what the slots read still hold of their empty start.
        empty = np.cumprod(a.keep, axis=0)
        np.testing.assert_allclose(a.attention.sum(1), 1 - (a.read * empty).sum(1), atol=1e-6)


def test_finite_for_gates_that_forget_everything_or_nothing():
    T = 12
    g = torch.tensor([0.0, -50.0, -1e30]).repeat(T, 1)
    g[5] = torch.tensor([-1e30, 0.0, 0.0])
    q, k = torch.randn(2, T, 4, generator=torch.Generator().manual_seed(0))
    for array in _follow(q, k, g, -torch.expm1(g)):
        assert np.isfinite(array).all()


def test_half_life_and_selectivity():
    a = slot_activity(make_model(), IDS, layer=0, head=1)
    np.testing.assert_allclose(a.keep**a.half_life, 0.5, rtol=1e-9)
    assert 0 < a.selectivity <= np.log2(6)


def test_one_head_is_that_of_all_heads():
    model = make_model(num_kv_heads=2)
    one = slot_activity(model, IDS, layer=0, head=3)
    same = next(a for a in slot_activities(model, IDS) if (a.layer, a.head) == (0, 3))
    np.testing.assert_array_equal(one.attention, same.attention)


def test_refuses_what_is_not_there():
    model = make_model(attn={"layers": [1], "num_heads": 4})
    assert gsa_layers(model) == [0]
    for layer, head, message in (
        (2, 0, "no layer 2; the model has layers 0 to 1"),
        (1, 0, r"layer 1 is \w+ and has no slots; layers with slots: \[0\]"),
        (0, 4, "no head 4; layer 0 has query heads 0 to 3"),
    ):
        with pytest.raises(UsageError, match=message):
            slot_activity(model, IDS, layer, head)
    with pytest.raises(UsageError, match="no token"):
        slot_activity(model, [], 0, 0)


def test_refuses_a_model_without_slots():
    with pytest.raises(UsageError, match="no gated slot attention layer"):
        slot_activities(make_model(token_mixer="gla"), IDS)
