"""The three numbers of a layer are those of the tables that inspection makes of every head."""

import numpy as np
import pytest
import torch

from flash_gsa import GSAConfig, GSAForCausalLM
from flash_gsa.errors import UsageError
from flash_gsa.inspection import slot_activities, slot_usage

TOKENS = [5, 3, 9, 9, 1, 0, 7, 7, 2, 11, 4, 4]


def model_of(**settings):
    torch.manual_seed(1)
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "num_slots": 6}
    return GSAForCausalLM(GSAConfig(**(sizes | {"intermediate_size": 16} | settings)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_kv_heads": 2}, {"gating": "abc"}, {"use_short_conv": True}, {"num_slots": 1}],
    ids=str,
)
def test_as_the_tables_say(settings):
    model = model_of(**settings)
    found = slot_usage(model, TOKENS)
    group = 4 // settings.get("num_kv_heads", 4)
    for layer in (0, 1):
        heads = [a for a in slot_activities(model, TOKENS) if a.layer == layer]
        read = np.stack([a.read.mean(0) for a in heads])  # [HQ, M]
        slots = read.shape[1]
        entropy = -(read * np.log(read)).sum(1).mean() / np.log(max(slots, 2))
        most = read.reshape(-1, group, slots).max(1)
        name = str(layer)
        assert found["forgetting"][name] == pytest.approx(np.mean([1 - a.keep for a in heads]), abs=1e-5)
        assert found["slot_entropy"][name] == pytest.approx(entropy, abs=1e-5)
        assert found["dead_slots"][name] == pytest.approx((most < 0.01 / slots).mean())


def test_dead_slots_are_found():
    model = model_of(num_hidden_layers=1, feature_map="identity", num_kv_heads=1, num_slots=4)
    attn = model.model.layers[0].attn

    def project(x):  # only the first slot is written, and every query head reads it alone
        q = torch.full((1, x.shape[1], 4, 1), 100.0)
        k = torch.ones(1, x.shape[1], 1, 1)
        s = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, x.shape[1], 1, 4)
        return q, k, k, torch.zeros(1, x.shape[1], 1, 4), s

    attn.project = project
    attn.forward = lambda x, **_: x
    found = slot_usage(model, TOKENS)
    assert found["forgetting"] == {"0": 0.0}
    assert found["slot_entropy"]["0"] == pytest.approx(0.0, abs=1e-6)
    assert found["dead_slots"] == {"0": 0.75}


def test_layers_of_other_kinds_are_left_out():
    assert slot_usage(model_of(token_mixer="gla"), TOKENS) == {}
    mixed = model_of(attn={"layers": [0], "num_heads": 4})
    assert {name: list(values) for name, values in slot_usage(mixed, TOKENS).items()} == {
        "forgetting": ["1"],
        "slot_entropy": ["1"],
        "dead_slots": ["1"],
    }


def test_autocast_rounds_no_slot():
    model = model_of(num_hidden_layers=1)
    attn = model.model.layers[0].attn
    with torch.no_grad():
        given = attn.project(torch.randn(1, len(TOKENS), 16))
    attn.project = lambda x, **_: given
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = slot_usage(model, TOKENS)
    assert found == slot_usage(model, TOKENS)


def test_no_token_is_refused():
    with pytest.raises(UsageError, match="no token to look at"):
        slot_usage(model_of(), [])
