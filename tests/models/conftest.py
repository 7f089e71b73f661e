from collections.abc import Callable

import pytest
import torch

from flash_gsa import GSAConfig, GSAForCausalLM

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 4, "num_slots": 6}
SIZES |= {"intermediate_size": 32, "initializer_range": 0.3}

VARIANTS = [
    {},
    {"num_kv_heads": 2, "use_short_conv": True},
    {"gating": "data_independent"},
    {"gating": "abc", "use_short_conv": True},
    {"gate_source": "pooled_keys", "tie_word_embeddings": True},
    {"attn": {"layers": [1]}},
    {"attn": {"layers": [0], "window_size": 5, "num_kv_heads": 1}, "use_short_conv": True},
    {"gating": "abc", "attn": {"layers": [0], "window_size": 3}},
    {"token_mixer": "attention"},
    {"token_mixer": "gla", "use_short_conv": True, "num_kv_heads": 2},
    {"token_mixer": "hgrn2"},
    {"token_mixer": "retnet"},
    {"token_mixer": "hgrn2", "attn": {"layers": [0]}, "use_short_conv": True},
]


def name_of(settings: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()).replace(" ", "") or "default"


def make(**settings) -> GSAForCausalLM:
    """A small model, with weights large enough that its layers do something."""
    torch.manual_seed(0)
    return GSAForCausalLM(GSAConfig(**(SIZES | settings))).eval()


@pytest.fixture(params=VARIANTS, ids=name_of)
def variant(request) -> dict:
    """Every mixer, every gating, with and without convolutions, and hybrids."""
    return request.param


@pytest.fixture
def model(variant) -> GSAForCausalLM:
    return make(**variant)


@pytest.fixture
def tiny() -> Callable[..., GSAForCausalLM]:
    """`tiny(**settings)`: a small model with these settings."""
    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """[2, 30] token ids."""
    return torch.randint(3, 50, (2, 30), generator=torch.Generator().manual_seed(1))
