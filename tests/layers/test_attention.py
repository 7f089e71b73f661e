"""Softmax attention against its definition, and with cache, padding and packing."""

from itertools import pairwise

import pytest
import torch

from flash_gsa import SoftmaxAttention
from flash_gsa.errors import UsageError

D = 24
VARIANTS = [
    {},
    {"num_kv_heads": 1},
    {"num_kv_heads": 2, "rope_theta": 100.0},
    {"window_size": 1},
    {"window_size": 5},
    {"window_size": 30, "num_kv_heads": 2},
    {"window_size": 29},
    {"qkv_bias": True},
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def name_of(options: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def layer(**options) -> SoftmaxAttention:
    torch.manual_seed(0)
    made = SoftmaxAttention(D, **{"num_heads": 4, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def inputs(B=2, T=30):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def by_definition(mixer: SoftmaxAttention, x: torch.Tensor) -> torch.Tensor:
    """Every weight on its own, rotations as complex numbers, in float64."""
    mixer, x = mixer.double(), x.double()
    H, G, S = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    T = x.shape[1]
    frequency = mixer.rope_theta ** (-torch.arange(0, S, 2, dtype=torch.float64) / S)
    turn = torch.polar(torch.ones(T, S // 2).double(), torch.arange(T).double()[:, None] * frequency)

    def heads(projected, count):
        projected = projected.view(*x.shape[:2], count, S)
        return torch.complex(projected[..., : S // 2], projected[..., S // 2 :]) * turn[:, None]

    q, k = heads(mixer.q_proj(x), H), heads(mixer.k_proj(x), G)
    v = mixer.v_proj(x).view(*x.shape[:2], G, S)
    o = torch.zeros(*x.shape[:2], H, S, dtype=torch.float64)
    for t in range(T):
        first = 0 if mixer.window_size is None else max(0, t - mixer.window_size + 1)
        for h in range(H):
            seen = slice(first, t + 1)
            group = h // (H // G)
            scores = (q[:, t, None, h] * k[:, seen, group].conj()).real.sum(-1) / S**0.5
            o[:, t, h] = torch.einsum("bj,bjs->bs", scores.softmax(-1), v[:, seen, group])
    y = mixer.o_proj(o.flatten(-2)).float()
    mixer.float()
    return y


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_is_its_definition(options):
    mixer = layer(**options)
    with torch.no_grad():
        torch.testing.assert_close(mixer(inputs()), by_definition(mixer, inputs()), **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.parametrize("bounds", [(0, 30), (0, 1, 30), (0, 4, 5, 12, 30), tuple(range(31))])
def test_pieces_through_a_cache_are_one_pass(options, bounds):
    mixer, x, cache = layer(**options), inputs(), {}
    pieces = [mixer(x[:, a:b], cache=cache) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), **CLOSE)
    assert cache[0]["seen"] == 30
    assert cache[0]["k"].shape[1] == min(30, options.get("window_size", 31) - 1)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_packed_is_a_loop_over_sequences(options):
    mixer, x = layer(**options), inputs(B=1)
    bounds = [0, 0, 2, 2, 20, 21, 30]
    packed = mixer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for a, b in pairwise(bounds):
        torch.testing.assert_close(packed[:, a:b], mixer(x[:, a:b]), **CLOSE)


def test_packed_sequences_are_padded_to_less_than_twice_their_length(monkeypatch):
    seen = []

    def recorded(q, *rest, original=torch.nn.functional.scaled_dot_product_attention, **options):
        seen.append(q.shape[0] * q.shape[2])
        return original(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    lengths = [100, 1, 2, 3, 0, 5, 1, 1, 9, 17, 33, 64, 65]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    layer()(inputs(B=1, T=sum(lengths)), cu_seqlens=bounds)
    assert sum(lengths) <= sum(seen) < 2 * sum(lengths)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_padding_changes_nothing(options, side):
    if side == "inside" and "window_size" in options:
        pytest.skip("a window counts places, so padding inside is not nothing to it")
    mixer, x = layer(**options), inputs()
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, {"left": slice(0, 9), "right": slice(-9, None), "inside": slice(10, 19)}[side]] = 0
    y = mixer(x, attention_mask=mask)
    real = mask[1].bool()
    torch.testing.assert_close(y[0], mixer(x[:1])[0], **CLOSE)
    torch.testing.assert_close(y[1, real], mixer(x[1:, real])[0], **CLOSE)
    assert y.isfinite().all()


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_going_on_after_left_padding(options):
    mixer, x, cache = layer(**options), inputs(), {}
    mask = torch.ones(2, 12)
    mask[1, :7] = 0
    mixer(x[:, :12], attention_mask=mask, cache=cache)
    later = [mixer(x[:, a:b], cache=cache) for a, b in ((12, 13), (13, 20), (20, 30))]
    torch.testing.assert_close(torch.cat(later, 1)[1:], mixer(x[1:, 7:])[:, 5:], **CLOSE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"num_heads": 0}, "must divide num_heads"),
        ({"num_heads": 8}, r"hidden_size = 24 must be a multiple of 2·num_heads = 16"),
        ({"window_size": 0}, "window_size must be at least 1, got 0; leave it out"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_refusals(change, words):
    with pytest.raises(UsageError, match=words):
        layer(**change)


def test_a_cache_over_packed_sequences_is_refused():
    with pytest.raises(UsageError, match="cannot carry a cache over packed sequences"):
        layer()(inputs(B=1), cu_seqlens=torch.tensor([0, 30]), cache={})
