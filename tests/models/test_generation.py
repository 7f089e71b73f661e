"""generate(): greedy, sampled, beams, padded, from embeddings, over several turns."""

import pytest
import torch

from flash_gsa.errors import UsageError

NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def naive(model, ids, new=NEW):
    """The most likely token of the whole sequence so far, again and again."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_is_the_argmax_of_the_whole_sequence(model, ids):
    want = naive(model, ids)
    logits = model(want).logits[:, 29:-1]
    for use_cache in (True, False):
        found = model.generate(ids, use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(found.sequences, want)
        torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-4, atol=1e-4)


def test_a_left_padded_batch_is_one_at_a_time(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for use_cache in (True, False):
        together = model.generate(ids, attention_mask=mask, use_cache=use_cache, **GREEDY)
        assert torch.equal(together[:1], naive(model, ids[:1]))
        assert torch.equal(together[1:, 9:], naive(model, ids[1:, 9:]))


def test_sampling_follows_the_seed_and_not_the_cache(model, ids):
    def sample(seed, **options):
        torch.manual_seed(seed)
        settings = GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
        return model.generate(ids, **settings, **options)

    first = sample(0)
    assert torch.equal(first, sample(0))
    assert torch.equal(first, sample(0, use_cache=False))
    assert not torch.equal(first, sample(1))
    assert sample(0, num_return_sequences=3).shape == (6, 30 + NEW)


def test_beams_are_those_without_a_cache(model, ids):
    def beams(**options):
        return model.generate(ids, num_beams=3, return_dict_in_generate=True, output_scores=True, **GREEDY, **options)

    found, want = beams(), beams(use_cache=False)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(found.sequences_scores, want.sequences_scores, rtol=1e-4, atol=1e-4)
    # Three beams find at least as likely a continuation as one.
    greedy = naive(model, ids)
    assert (likelihood(model, found.sequences) >= likelihood(model, greedy) - 1e-3).any()


@torch.no_grad()
def likelihood(model, sequences):
    logs = model(sequences).logits[:, 29:-1].log_softmax(-1)
    return logs.gather(-1, sequences[:, 30:, None]).sum((1, 2))


def test_from_embeddings(model, ids):
    embedded = model.get_input_embeddings()(ids)
    want = naive(model, ids)[:, 30:]
    for use_cache in (True, False):
        found = model.generate(inputs_embeds=embedded, use_cache=use_cache, **GREEDY)
        assert torch.equal(found, want)


def test_several_turns_with_one_cache(model, ids):
    first = model.generate(ids[:, :10], return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.get_seq_length() == 10 + NEW - 1
    prompt = torch.cat([first.sequences, ids[:, 10:15]], dim=1)
    second = model.generate(prompt, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(second.sequences, naive(model, prompt))
    assert second.past_key_values is cache


def test_several_turns_after_left_padding(model, ids):
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    first = model.generate(ids[:, :10], attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    prompt = torch.cat([first.sequences, ids[:, 10:15]], dim=1)
    longer = torch.cat([mask, torch.ones(2, prompt.shape[1] - 10, dtype=torch.int64)], dim=1)
    second = model.generate(prompt, attention_mask=longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second[:1], naive(model, prompt[:1]))
    assert torch.equal(second[1:, 4:], naive(model, prompt[1:, 4:]))


@pytest.mark.parametrize(
    "settings", [{}, {"gating": "abc"}, *({"token_mixer": name} for name in ("gla", "hgrn2", "retnet", "attention"))]
)
def test_padding_between_turns(tiny, ids, settings):
    model = tiny(**settings)
    cache = model(ids[:, :10]).past_key_values
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, 10:13] = 0
    found = model.generate(ids[:, :15], attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found[:1], naive(model, ids[:1, :15]))
    assert torch.equal(found[1:, 15:], naive(model, ids[1:, :15][mask[1:].bool()][None])[:, 12:])


def test_a_cache_that_has_seen_everything_is_refused(tiny, ids):
    model = tiny()
    cache = model(ids).past_key_values
    with pytest.raises(UsageError, match="has seen 30 tokens and input_ids holds no later one"):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_it_stops_at_the_end_token(tiny, ids):
    model = tiny()
    want = naive(model, ids[:1])
    end = int(want[0, 33])
    stop = want[0, 30:].tolist().index(end) + 31
    assert torch.equal(model.generate(ids[:1], **(GREEDY | {"eos_token_id": end})), want[:, :stop])


def test_assisted_decoding_is_refused(tiny, ids):
    # It would have to take back tokens, which a recurrent state cannot.
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny().generate(ids[:1], assistant_model=tiny(), **GREEDY)
