"""The cache: constant size, rows moved about, copies that go their own way."""

import pytest
import torch

from flash_gsa import GSACache
from flash_gsa.errors import UsageError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_its_size_does_not_grow_with_length(model, variant, ids):
    sizes = [model(ids[:, :length]).past_key_values.nbytes() for length in (10, 20, 30)]
    attn = variant.get("attn", {})
    if variant.get("token_mixer") == "attention" or (attn and "window_size" not in attn):
        assert sizes[0] < sizes[1] < sizes[2]
    else:
        assert sizes[0] == sizes[1] == sizes[2]


def test_its_size_in_bytes(tiny, ids):
    # Two layers, two rows, four heads: six slots of a key and a value of six numbers each.
    assert tiny()(ids).past_key_values.nbytes() == 2 * 2 * 4 * (6 * 6 + 6 * 6) * 4


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [1], [1, 1, 0]])
@torch.no_grad()
def test_rows_are_kept_and_reordered(model, ids, rows):
    mask = torch.ones(2, 20)
    mask[1, :5] = 0
    for method in ("reorder_cache", "batch_select_indices"):
        cache = model(ids[:, :20], attention_mask=mask).past_key_values
        getattr(cache, method)(torch.tensor(rows))
        later = model(ids[rows, 20:], past_key_values=cache).logits
        for place, row in enumerate(rows):
            real = ids[row : row + 1, 5 * row :]
            torch.testing.assert_close(later[place], model(real).logits[0, -10:], **CLOSE)


@torch.no_grad()
def test_rows_are_repeated(model, ids):
    cache = model(ids[:, :20]).past_key_values
    cache.batch_repeat_interleave(2)
    later = model(ids[:, 20:].repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 20:].repeat_interleave(2, 0), **CLOSE)


@torch.no_grad()
def test_a_clone_goes_its_own_way(model, ids):
    cache = model(ids[:, :20]).past_key_values
    copy = cache.clone()
    other = ids.flip(0)
    model(other[:, 20:25], past_key_values=copy)
    assert (cache.get_seq_length(), copy.get_seq_length()) == (20, 25)
    later = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 20:], **CLOSE)


def test_detached_it_holds_no_graph(model, ids):
    cache = model(ids).past_key_values
    kept = cache.detach()
    assert any(x.requires_grad for entry in cache.values() for x in tensors(entry))
    assert not any(x.requires_grad for entry in kept.values() for x in tensors(entry))
    assert kept.get_seq_length() == 30


def tensors(entry: dict) -> list[torch.Tensor]:
    parts = [part for value in entry.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_it_moves_to_a_device(model, ids):
    moved = model(ids).past_key_values.to("meta")
    assert all(x.device.type == "meta" for entry in moved.values() for x in tensors(entry))
    assert moved.get_seq_length() == 30


def test_gradients_flow_through_it(tiny, ids):
    model = tiny()
    whole, pieces = [], []
    model(ids, labels=ids).logits[:, 15:].square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cache = model(ids[:, :15], use_cache=True).past_key_values
    model(ids[:, 15:], past_key_values=cache).logits.square().sum().backward()
    pieces = [p.grad for p in model.parameters()]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_it_is_a_mapping_from_layers():
    cache = GSACache()
    assert cache
    assert len(cache) == 0
    cache[3] = {"state": (torch.zeros(1), torch.zeros(2))}
    assert list(cache) == [3]
    assert 3 in cache
    assert cache.nbytes() == 12
    cache.advance(4)
    del cache[3]
    assert (len(cache), cache.get_seq_length(), cache.get_max_cache_shape()) == (0, 4, -1)
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_states_in_bfloat16_are_half_as_large_and_nearly_the_same(tiny, ids):
    model = tiny()
    whole = model(ids).logits
    found, sizes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        cache = GSACache(state_dtype=dtype)
        # A piece, tokens one by one, and a piece again.
        steps = [model(ids[:, :10], past_key_values=cache).logits]
        steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
        assert {x.dtype for entry in cache.values() for x in entry["state"]} == {dtype}
        cache = cache.clone()
        steps.append(model(ids[:, 20:], past_key_values=cache).logits)
        assert {x.dtype for entry in cache.values() for x in entry["state"]} == {dtype}
        found[dtype], sizes[dtype] = torch.cat(steps, dim=1), cache.nbytes()
    assert sizes[torch.bfloat16] == sizes[torch.float32] / 2
    torch.testing.assert_close(found[torch.float32], whole, **CLOSE)
    off = (found[torch.bfloat16] - whole).norm() / whole.norm()
    assert 1e-5 < off < 2e-2


@torch.no_grad()
def test_generation_with_states_in_bfloat16(tiny, ids):
    model = tiny()
    cache = GSACache(state_dtype=torch.bfloat16)
    known = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=2)
    assert known.shape == (2, ids.shape[1] + 8)
    assert {x.dtype for entry in cache.values() for x in entry["state"]} == {torch.bfloat16}


@torch.no_grad()
def test_what_is_not_a_float32_pair_stays_as_it_is(tiny, ids):
    cache = GSACache(state_dtype=torch.bfloat16)
    tiny().double()(ids, past_key_values=cache)
    assert {x.dtype for entry in cache.values() for x in entry["state"]} == {torch.float64}
    cache = GSACache(state_dtype=torch.bfloat16)
    tiny(token_mixer="retnet")(ids, past_key_values=cache)
    assert {entry["state"].dtype for entry in cache.values()} == {torch.float32}


def test_other_formats_of_states_are_refused():
    with pytest.raises(UsageError, match=r"must be torch.float32 or torch.bfloat16, got torch.float16"):
        GSACache(state_dtype=torch.float16)
