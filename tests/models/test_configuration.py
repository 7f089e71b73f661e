"""The configuration: published files load, sizes are the published ones, nonsense is refused by name."""

import json

import pytest
import torch

from flash_gsa import GSAConfig, GSAForCausalLM
from flash_gsa.errors import UsageError

# As the flash-linear-attention package writes it.
PUBLISHED = """{
  "architectures": ["GSAForCausalLM"], "attn": null, "bos_token_id": 1, "clamp_max": null, "clamp_min": null,
  "elementwise_affine": false, "eos_token_id": 2, "exapnd_k": 0.5, "exapnd_v": 2, "feature_map": "swish",
  "fuse_cross_entropy": true, "fuse_linear_cross_entropy": false, "fuse_norm": true, "fuse_swiglu": true,
  "gate_logit_normalizer": 4, "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 64,
  "initializer_range": 0.006, "intermediate_size": null, "max_position_embeddings": 2048, "model_type": "gsa",
  "norm_eps": 1e-06, "num_heads": 4, "num_hidden_layers": 2, "num_kv_heads": null, "num_slots": 32,
  "pad_token_id": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.48.2",
  "use_cache": true, "use_l2warp": false, "use_norm": true, "use_output_gate": false, "use_short_conv": false,
  "vocab_size": 100
}"""

# hidden, layers, heads, kv heads, τ, affine, ε, intermediate and the size in the name
ROWS = {
    "340M": (1024, 24, 4, None, 8, False, 1e-6, 2816, 0.36e9),
    "1.3B": (2048, 24, 4, None, 8, False, 1e-6, 5632, 1.35e9),
    "2.7B": (2560, 32, 5, None, 8, False, 1e-6, 6912, 2.7e9),
    "7B": (4096, 32, 32, 8, 8, True, 1e-5, 14336, 7.25e9),
}


def test_a_published_file_loads(tmp_path):
    (tmp_path / "config.json").write_text(PUBLISHED)
    config = GSAConfig.from_pretrained(tmp_path)
    assert (config.expand_k, config.expand_v, config.num_slots, config.gate_logit_normalizer) == (0.5, 2, 32, 4)
    assert config.intermediate_size == 256
    assert config.dtype == torch.bfloat16
    model = GSAForCausalLM(config)
    assert model(torch.ones(1, 4).long()).logits.shape == (1, 4, 100)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"exapnd_k", "fuse_norm", "clamp_min", "use_output_gate"} & written.keys()
    assert GSAConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()


def test_a_published_hybrid_loads():
    attn = {
        "layers": [1],
        "num_heads": 8,
        "num_kv_heads": 8,
        "qkv_bias": False,
        "window_size": None,
        "rope_theta": 10000.0,
    }
    config = GSAConfig(**(json.loads(PUBLISHED) | {"attn": attn}))
    assert [config.mixer_of(i) for i in range(2)] == ["gsa", "attention"]
    mixer = GSAForCausalLM(config).model.layers[1].attn
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.window_size) == (8, 8, None)


@pytest.mark.parametrize("name", ROWS)
def test_published_sizes(name):
    hidden, layers, heads, kv, tau, affine, eps, intermediate, count = ROWS[name]
    config = GSAConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        gate_logit_normalizer=tau,
        elementwise_affine=affine,
        norm_eps=eps,
        # 2/3·4·d rounded up, but for Mistral's, which is its own.
        intermediate_size=14336 if name == "7B" else None,
    )
    assert config.intermediate_size == intermediate
    with torch.device("meta"):
        model = GSAForCausalLM(config)
    assert abs(model.num_parameters() / count - 1) < 0.06
    assert any("g_norm" in key for key in model.state_dict()) is affine


def test_defaults_are_the_1_3_b_model():
    config = GSAConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads, config.num_slots) == (2048, 24, 4, 64)
    assert (config.intermediate_size, config.gate_logit_normalizer, config.vocab_size) == (5632, 8.0, 32000)


def test_attention_layers():
    assert GSAConfig().attention_layers == []
    assert GSAConfig(attn={"layers": [6, 0]}).attention_layers == [0, 6]
    assert GSAConfig(num_hidden_layers=2, token_mixer="attention").attention_layers == [0, 1]
    assert GSAConfig(num_hidden_layers=2, token_mixer="attention").mixer_of(1) == "attention"


def test_a_wider_mlp_by_ratio():
    assert GSAConfig(hidden_size=1024, hidden_ratio=2).intermediate_size == 1536
    assert GSAConfig(hidden_size=1024, hidden_ratio=4, intermediate_size=2816).intermediate_size == 2816


WHOLE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "num_slots",
    "gate_low_rank_dim",
    "num_kv_heads",
    "intermediate_size",
)
POSITIVE = ("expand_k", "expand_v", "gate_logit_normalizer", "norm_eps", "initializer_range")
SWITCHES = ("use_short_conv", "use_norm", "elementwise_affine", "use_cache", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({name: bad}, f"{name} must be a whole number of at least 1")
            for name in WHOLE
            for bad in (0, 2.5, True, "4")
        ),
        *(({name: bad}, f"{name} must be a number above 0") for name in POSITIVE for bad in (0, -1.0, True, "1")),
        *(({name: bad}, f"{name} must be true or false") for name in SWITCHES for bad in (1, "no", None)),
        *(({"conv_size": bad}, "conv_size must be a whole number of at least 2") for bad in (1, 2.5, "4")),
        *(({"hidden_ratio": bad}, "hidden_ratio must be a number above 0") for bad in (0, -2, "4")),
        ({"gate_logit_normaliser": 8}, "no setting 'gate_logit_normaliser'.*Did you mean 'gate_logit_normalizer'"),
        ({"num_slot": 8}, "GSAConfig has no setting 'num_slot'. Did you mean 'num_slots'"),
        ({"something_else": 1}, "no setting 'something_else'. Settings: vocab_size"),
        ({"intermediate_size": 512, "hidden_ratio": 4}, "contradict each other; give one of them"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'swish'"),
        (
            {"token_mixer": "gas"},
            "token_mixer='gas' is not known; choose one of gsa, gla, .*attention. Did you mean 'gsa'",
        ),
        ({"token_mixer": ["gsa"]}, r"token_mixer=\['gsa'\] is not known"),
        ({"token_mixer": "gla", "use_output_gate": False}, "the output gate is part of token_mixer='gla'; leave it"),
        ({"token_mixer": "gla", "clamp_min": -3.0}, "clamp_min=-3.0: gates need no clamping here; leave it out"),
        ({"attn": [0]}, "attn must be a dictionary"),
        ({"attn": {}}, "attn.layers must list the blocks"),
        ({"attn": {"layers": 3}}, "attn.layers must list the blocks"),
        ({"attn": {"layers": [24]}}, "attn.layers holds 24, but blocks are numbered 0 to 23"),
        ({"attn": {"layers": [-1]}}, "attn.layers holds -1"),
        ({"attn": {"layers": [True]}}, "attn.layers holds True"),
        ({"attn": {"layers": [0], "window": 3}}, "attn has no setting 'window'. Did you mean 'window_size'"),
        ({"attn": {"layers": [0]}, "token_mixer": "attention"}, "makes every layer attention; leave attn.layers out"),
    ],
    ids=str,
)
def test_refusals(settings, words):
    with pytest.raises(UsageError, match=words):
        GSAConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"feature_map": "gelu"}, {"num_heads": 3}, {"gating": "none"}, {"num_kv_heads": 3}]
)
def test_what_a_layer_refuses_the_model_refuses(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        GSAForCausalLM(GSAConfig(**({"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1} | settings)))
