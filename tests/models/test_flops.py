"""FLOPs a token: what PyTorch counts in the linear maps, and what the definitions say of the rest."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flash_gsa import GSAConfig, GSAForCausalLM
from flash_gsa.layers import SoftmaxAttention
from flash_gsa.models.flops import forward_flops, training_flops

SIZES = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "intermediate_size": 96}


def model_of(**settings) -> GSAForCausalLM:
    torch.manual_seed(0)
    return GSAForCausalLM(GSAConfig(**(SIZES | settings)))


def without_mixing(model: nn.Module, length: int) -> float:
    return forward_flops(model, length) - sum(
        m.mixing_flops(length) for m in model.modules() if hasattr(m, "mixing_flops")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_slots": 16},
        {"num_slots": 16, "num_kv_heads": 2, "tie_word_embeddings": True},
        {"token_mixer": "gla"},
        {"token_mixer": "hgrn2"},
        {"token_mixer": "retnet"},
        {"token_mixer": "attention"},
    ],
    ids=str,
)
def test_linear_maps_are_what_pytorch_counts(settings):
    model, tokens = model_of(**settings), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    # Products of the operator are batched ones; linear maps are not.
    counted = counter.get_flop_counts()["Global"]
    linear = sum(counted.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert without_mixing(model, tokens) * tokens == linear


def test_convolutions_count():
    plain, mixed = model_of(num_slots=16), model_of(num_slots=16, use_short_conv=True, conv_size=3)
    channels = 2 * 3 * 64  # q, k and v of two layers
    assert forward_flops(mixed, 10) - forward_flops(plain, 10) == 2 * 3 * channels


def test_gated_slot_attention_writes_per_key_head_and_reads_per_query_head():
    model = model_of(num_slots=16, num_kv_heads=2)
    layer = model.model.layers[0].attn
    writes, reads = 2 * 2 * 16 * (16 + 16), 4 * 2 * 16 * (16 + 16)
    assert layer.mixing_flops(7) == layer.mixing_flops(7000) == writes + reads


def test_gated_linear_attention_has_one_state():
    layer = model_of(token_mixer="gla", expand_k=0.5, expand_v=1.0).model.layers[0].attn
    assert layer.mixing_flops(7) == 2 * 8 * 16 * (4 + 4)


@pytest.mark.parametrize(("window", "length"), [(None, 1), (None, 10), (3, 10), (10, 10), (30, 10), (1, 5)])
def test_softmax_attention_counts_what_is_in_sight(window, length):
    layer = SoftmaxAttention(64, num_heads=4, window_size=window)
    in_sight = [sum(0 <= t - j < (window or length) for j in range(length)) for t in range(length)]
    # A score and a share of the output are 16 multiplications and additions each, in each of 4 heads.
    assert layer.mixing_flops(length) == pytest.approx(sum(in_sight) / length * 4 * 2 * 2 * 16)


def test_training_is_three_times_a_forward():
    model = model_of(num_slots=16)
    assert training_flops(model, 100) == 3 * forward_flops(model, 100)


def test_the_1_3b_model_is_near_six_times_its_parameters():
    with torch.device("meta"):
        model = GSAForCausalLM(
            GSAConfig(vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_heads=4, num_slots=64)
        )
    multiplied = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    assert 1.0 < training_flops(model, 2048) / (6 * multiplied) < 1.05
