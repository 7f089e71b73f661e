"""A model with any token mixer is one configuration value; each trains, and has its published settings and names."""

from pathlib import Path

import pytest
import torch

from flash_gsa import HGRN2, GatedLinearAttention, GSAConfig, GSAForCausalLM, MultiScaleRetention, SoftmaxAttention
from flash_gsa.layers import MIXERS, PUBLISHED
from flash_gsa.training.model import check_model
from flash_gsa.training.recipe_file import load_recipe

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
KINDS = {"gla": GatedLinearAttention, "hgrn2": HGRN2, "retnet": MultiScaleRetention, "attention": SoftmaxAttention}


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_trains(tiny, mixer):
    # Eight random rows, the second half of each being the first again: learnt by heart or by looking back.
    model = tiny(token_mixer=mixer, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    random, losses = torch.Generator().manual_seed(0), []
    half = torch.randint(3, 50, (8, 8), generator=random)
    ids = torch.cat([half, half], 1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0], losses


@pytest.mark.parametrize("gating", ["gsa", "abc"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_without_memory_there_are_shapes(mixer, gating):
    """For whoever counts parameters, FLOPs or bytes of a model that no machine here could hold."""
    config = GSAConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8, token_mixer=mixer)
    if gating == "abc":
        if mixer != "gsa":
            pytest.skip("ABC's gates are those of slots")
        config.gating = gating
    with torch.device("meta"):
        model = GSAForCausalLM(config)
        logits = model(torch.zeros(2, 100, dtype=torch.long)).logits
        logits.sum().backward()
    assert logits.shape == (2, 100, 50)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("mixer", KINDS)
def test_blocks_hold_the_mixer_that_was_named(tiny, mixer):
    assert all(isinstance(block.attn, KINDS[mixer]) for block in tiny(token_mixer=mixer).model.layers)
    if mixer != "attention":
        first, second = tiny(token_mixer=mixer, attn={"layers": [1]}).model.layers
        assert isinstance(first.attn, KINDS[mixer])
        assert isinstance(second.attn, SoftmaxAttention)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_moved_to_another_mixer_by_one_value(name, mixer):
    needed = ["data.source=a.jsonl", "data.valid_source=b.jsonl"] if name.startswith("prose") else []
    check_model(load_recipe(name, [f"model.token_mixer={mixer}", *needed]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_published_1_3b_sizes(mixer):
    config = GSAConfig(token_mixer=mixer)
    with torch.device("meta"):
        model = GSAForCausalLM(config)
    assert abs(model.num_parameters() / 1.35e9 - 1) < 0.06
    for name, value in PUBLISHED[mixer].items():
        if name != "hidden_ratio":
            assert getattr(config, name) == value
    assert config.intermediate_size == (2816 if mixer == "retnet" else 5632)


def test_what_is_given_goes_before_what_is_published():
    config = GSAConfig(token_mixer="gla", num_heads=8, expand_k=1.0, feature_map="swish", gate_logit_normalizer=4)
    found = (config.num_heads, config.expand_k, config.feature_map, config.gate_logit_normalizer, config.expand_v)
    assert found == (8, 1.0, "swish", 4, 1.0)
    assert GSAConfig(token_mixer="retnet", hidden_ratio=4).intermediate_size == 5632


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_configuration_is_the_same_again(mixer, tmp_path):
    config = GSAConfig(token_mixer=mixer, hidden_size=64)
    config.save_pretrained(tmp_path)
    again = GSAConfig.from_pretrained(tmp_path)
    assert {n: v for n, v in again.to_dict().items() if n != "_name_or_path"} == {
        n: v for n, v in config.to_dict().items() if n != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("mixer", "settings", "name"),
    [
        ("gla", {"gate_low_rank_dim": 5}, "attn.gk_proj.0.weight"),
        ("gla", {"expand_k": 1.0}, "attn.k_proj.weight"),
        ("retnet", {"expand_v": 1.0}, "attn.v_proj.weight"),
        ("hgrn2", {"num_kv_heads": 2}, "attn.f_proj.weight"),
    ],
)
def test_settings_reach_their_layers(tiny, mixer, settings, name):
    shapes = [
        dict(tiny(token_mixer=mixer, **more).model.layers[0].named_parameters())[name].shape for more in ({}, settings)
    ]
    assert shapes[0] != shapes[1]


def test_lower_bounds_of_hgrn2(tiny, ids):
    model = tiny(token_mixer="hgrn2", num_hidden_layers=3)
    bounds = model.model.lower_bounds
    assert "model.lower_bounds" in model.state_dict()
    assert bounds.shape == (3, 24)
    assert (bounds == 0).all()
    assert tiny().model.lower_bounds is None

    # With bounds near 1 the upper layers forget nothing and write nothing.
    before = model(ids).logits
    with torch.no_grad():
        bounds[1:] += 30.0
    after = model(ids, output_hidden_states=True)
    assert not torch.allclose(before, after.logits, atol=1e-2)
    gate = model.model.layers[2].attn.project(torch.randn(1, 4, 24), lower_bound=torch.ones(24))[3]
    assert torch.equal(gate, torch.zeros_like(gate))

    model.zero_grad()
    with torch.no_grad():
        bounds.normal_()
    model(ids, labels=ids).loss.backward()
    assert (bounds.grad.abs().sum(1) > 0).all()


def test_initial_biases_and_bounds_are_zero(tiny):
    gla, hgrn2 = tiny(token_mixer="gla"), tiny(token_mixer="hgrn2")
    assert all((block.attn.gk_proj[1].bias == 0).all() for block in gla.model.layers)
    assert all((block.attn.g_norm_swish_gate.weight == 1).all() for block in gla.model.layers)
    assert (hgrn2.model.lower_bounds == 0).all()


def test_trained_bounds_survive_loading(tiny, tmp_path):
    model = tiny(token_mixer="hgrn2")
    with torch.no_grad():
        model.model.lower_bounds.normal_()
    model.save_pretrained(tmp_path)
    again = GSAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.lower_bounds, model.model.lower_bounds)
