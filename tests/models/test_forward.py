"""The model in one pass: pieces, padding, packing, loss, checkpointing, number formats, refusals."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import GSACache
from flash_gsa.errors import UsageError
from flash_gsa.models import GSAModel

# transformers renames it; every version this package runs with has the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("bounds", [(0, 1, 30), (0, 7, 8, 20, 30), tuple(range(31))])
@torch.no_grad()
def test_pieces_through_a_cache_are_one_pass(model, ids, bounds):
    cache, pieces = GSACache(), []
    for a, b in pairwise(bounds):
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == b
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_is_one_at_a_time(model, ids, side):
    mask = torch.ones_like(ids)
    mask[1, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row in range(2):
        real = mask[row].bool()
        torch.testing.assert_close(logits[row, real], model(ids[row : row + 1, real]).logits[0], **CLOSE)


@torch.no_grad()
def test_packed_is_one_at_a_time(model, ids):
    row, bounds = ids.reshape(1, -1), [0, 0, 11, 12, 40, 60]
    packed = model(row, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert packed.past_key_values is None
    for a, b in pairwise(bounds):
        if a < b:
            torch.testing.assert_close(packed.logits[:, a:b], model(row[:, a:b]).logits, **CLOSE)


@torch.no_grad()
def test_going_on_after_left_padding_with_masks_of_either_length(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    want = model(ids[1:, 9:]).logits[:, 11:]
    for later in (None, mask[:, 20:], mask):
        cache = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
        logits = model(ids[:, 20:], attention_mask=later, past_key_values=cache).logits
        torch.testing.assert_close(logits[1:], want, **CLOSE)


@torch.no_grad()
def test_the_future_is_not_seen_by_a_bit(model, ids):
    changed = ids.clone()
    changed[:, 17:] = 4
    a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :17], b[:, :17])
    assert not torch.equal(a[:, 17:], b[:, 17:])


@torch.no_grad()
def test_embeddings_and_hidden_states(model, ids):
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(out.logits, model.lm_head(out.hidden_states[-1]))
    assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert torch.equal(out.logits, model(inputs_embeds=out.hidden_states[0]).logits)
    assert model(ids).hidden_states is None


@torch.no_grad()
def test_a_tuple_where_asked_for(tiny, ids):
    model = tiny()
    want = model(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], want)
    assert torch.equal(tiny(return_dict=False)(ids)[0], want)
    assert tiny(output_hidden_states=True)(ids).hidden_states is not None


@torch.no_grad()
def test_logits_of_the_last_positions_only(tiny, ids):
    model = tiny()
    want = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, want[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 7])).logits, want[:, [3, 7]])


def test_a_cache_is_returned_as_configured_and_never_in_training(tiny, ids):
    assert tiny()(ids).past_key_values is not None
    assert tiny()(ids, use_cache=False).past_key_values is None
    assert tiny(use_cache=False)(ids).past_key_values is None
    assert tiny(use_cache=False)(ids, use_cache=True).past_key_values is not None
    assert tiny().train()(ids).past_key_values is None


def test_the_loss_is_of_the_next_token(tiny, ids):
    model, labels = tiny(), ids.clone()
    labels[0, 5:9] = -100
    out = model(ids, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, want)
    scored = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, want * scored / 7)
    torch.testing.assert_close(model(ids, labels=labels, return_dict=False)[0], want)


def test_the_loss_of_packed_documents_is_the_mean_over_their_tokens(tiny, ids):
    model, row, bounds = tiny(), ids.reshape(1, -1), [0, 0, 11, 12, 40, 60, 60]
    labels = row.clone()
    loss = model(row, labels=labels, cu_seqlens=torch.tensor(bounds)).loss
    assert torch.equal(labels, row)
    total, count = 0.0, 0
    for a, b in pairwise(bounds):
        if b - a > 1:
            total += model(row[:, a:b], labels=row[:, a:b]).loss * (b - a - 1)
            count += b - a - 1
    torch.testing.assert_close(loss, total / count)


def gradients(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(model, ids):
    model.train()
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    want = gradients(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing
    for name, gradient in gradients(model, ids, attention_mask=mask).items():
        torch.testing.assert_close(gradient, want[name], msg=name)
        assert gradient.abs().sum() > 0, f"{name} gets no gradient"


def test_gradient_checkpointing_refuses_a_cache(tiny, ids):
    model = tiny().train()
    model.gradient_checkpointing_enable()
    for options in ({"use_cache": True}, {"past_key_values": GSACache()}):
        with pytest.raises(UsageError, match=r"would advance the cache twice; call with use_cache=False"):
            model(ids, **options)
    assert model.eval()(ids).past_key_values is not None


def test_bfloat16_is_near_float32_with_float32_states(model, ids):
    want = model(ids).logits
    half = model.to(torch.bfloat16)
    out = half(ids, labels=ids, use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    for entry in out.past_key_values.values():
        assert all(part.dtype == torch.float32 for part in entry.get("state", ()))
    assert (out.logits - want).norm() < 0.1 * want.norm()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast(model, ids, dtype):
    want = model(ids).logits
    with torch.autocast("cpu", dtype):
        out = model(ids, labels=ids, use_cache=True)
    assert out.logits.dtype == dtype
    assert (out.logits - want).norm() < 0.1 * want.norm()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 24)}, "give either input_ids or"),
        ({"input_ids": torch.ones(3).long()}, r"input_ids must be \[B, T\], got \[3\]"),
        ({"input_ids": torch.tensor([[1, 50]])}, "holds id 50, but the vocabulary has 50 ids; was the text tokenised"),
        ({"input_ids": torch.tensor([[1, -1]])}, "holds id -1"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \[B, T\] = \[1, 3\], got \[1, 4\]"),
        ({"attention_mask": torch.ones(2, 3)}, r"got \[2, 3\]"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"got \[1, 1, 3, 3\]"),
        ({"attention_mask": torch.ones(1, 3), "cu_seqlens": torch.tensor([0, 3])}, "attention_mask .* or cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens must end with T = 3, got 2"),
        ({"past_key_values": ((), ())}, "past_key_values must be a flash_gsa GSACache, got tuple; pass None"),
        ({"attention_mask": torch.tensor([[1, 1, 0]]), "use_cache": True}, "ends in padding.*Pad on the left"),
        ({"labels": torch.ones(1, 3).long(), "logits_to_keep": 1}, "logits_to_keep must be 0"),
    ],
)
def test_refusals(tiny, options, words):
    options = (
        options if not options or "input" in next(iter(options)) else {"input_ids": torch.ones(1, 3).long()} | options
    )
    with pytest.raises(UsageError, match=words):
        tiny()(**options)


def test_masks_of_a_piece_name_both_lengths(tiny, ids):
    model = tiny()
    cache = model(ids[:, :20]).past_key_values
    with pytest.raises(UsageError, match=r"= \[2, 10\] or, with the 20 tokens seen before, \[2, 30\], got \[2, 29\]"):
        model(ids[:, 20:], attention_mask=torch.ones(2, 29), past_key_values=cache)


def test_a_misspelt_argument_is_not_swallowed(tiny, ids):
    with pytest.raises(TypeError, match="atention_mask"):
        tiny()(ids, atention_mask=torch.ones_like(ids))


def test_parameters_have_their_published_names(tiny):
    def names(**settings):
        return set(tiny(**settings).state_dict())

    layers = [f"model.layers.{i}." for i in range(2)]
    parts = ["attn_norm", "mlp_norm", "attn.g_norm"]
    parts += [f"attn.{part}_proj" for part in "qkvfo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    want = {f"{layer}{part}.weight" for layer in layers for part in parts}
    want |= {"model.embeddings.weight", "model.norm.weight", "lm_head.weight"}
    assert names() == want
    assert names(elementwise_affine=False) == {name for name in want if "g_norm" not in name}
    assert names(use_short_conv=True) - want == {
        f"{layer}attn.{part}_conv1d.weight" for layer in layers for part in "qkv"
    }
    assert names(gating="data_independent") - want == {f"{layer}attn.f_bias" for layer in layers}
    assert want - names(attn={"layers": [1]}) == {
        "model.layers.1.attn.f_proj.weight",
        "model.layers.1.attn.g_norm.weight",
    }


def test_initial_weights_follow_the_configuration(tiny):
    model = tiny(initializer_range=0.01, hidden_size=96, use_short_conv=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif "conv" in name:
            assert parameter.abs().max() <= 0.5
        else:
            assert 0.009 < parameter.std() < 0.011, name


def test_the_model_without_logits(tiny, ids):
    whole = tiny()
    body = GSAModel(whole.config).eval()
    body.load_state_dict(whole.model.state_dict())
    assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert torch.equal(body(ids, return_dict=False)[0], whole.model(ids).last_hidden_state)


def test_embeddings_can_be_resized(tiny, ids):
    model = tiny()
    want = model(ids).logits
    model.resize_token_embeddings(60)
    torch.testing.assert_close(model(ids).logits[..., :50], want)
    assert model(torch.full((1, 3), 59)).logits.shape == (1, 3, 60)
