"""Models over several processes give what one process gives: hidden states, loss and every gradient."""

import pytest
import torch

from flash_gsa import GSACache, GSAConfig, GSAForCausalLM
from flash_gsa.data import Batch
from flash_gsa.errors import UsageError
from flash_gsa.parallel import apply_context_parallel, exchange, stretch
from tests.parallel.models import MODELS, MODELS_ON_GPUS, whole
from tests.parallel.test_context import Ranks, each

pytestmark = pytest.mark.timeout(600)  # all processes' cases run once, for all tests


def found_by(parts, case):
    """Hidden states of all processes in order, all else as the first has it."""
    first = parts[0][case.name]
    return first | {"hidden": torch.cat([part[case.name]["hidden"] for part in parts], dim=1)}


def off(got, want):
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@each(MODELS)
def test_as_one_process(found, ranks, case):
    wanted, got = whole(case), found_by(found[:ranks], case)
    assert off(got["suspended"], wanted["hidden"]) <= case.near
    for name, want in wanted.items():
        assert want.norm() > 1e-6, f"{name} says nothing"
        assert off(got[name], want) <= case.near, name


def test_what_is_sent_does_not_grow_with_the_length(found):
    short, longer = (found[0][name]["sent"].tolist() for name in ("gsa, packed", "gsa, longer"))
    assert short == longer
    # In each of 2 layers the inputs of a convolution for each of q, k, v, and the state; backward as much from all.
    width, heads, K, M, W = 16, 2, 4, 5, 4
    own = [(W - 1) * width, (W - 1) * heads * K, (W - 1) * heads * K, heads * M * (2 * K + 1)]
    assert short == 2 * own + [2 * x for x in 2 * own[::-1]]


@pytest.mark.gpu
@each(MODELS_ON_GPUS)
def test_gpus_as_one_process(found_on_gpus, ranks, case):
    if len(found_on_gpus) < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    # Against float32 on the CPU, and no further from it than one GPU with whole rows and the same roundings.
    exact, got = whole(case, autocast=False), found_by(found_on_gpus[:ranks], case)
    for name, want in exact.items():
        assert off(got[name], want) <= 2 * off(got[f"alone: {name}"], want) + 1e-3, name


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(exchange, "dist", Ranks(1, 2))


SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "num_slots": 3}
IDS = torch.zeros(1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attention_mask": torch.ones(1, 6)}, "attention_mask was given .* pack the sequences and give cu_seqlens"),
        ({"use_cache": True}, "use_cache was given .* use_cache=False"),
        ({"past_key_values": GSACache()}, "past_key_values was given .* leave it out"),
        ({"labels": IDS}, "labels were given .*next_token_loss"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must end with T = 12, got 6"),
    ],
)
def test_what_belongs_to_whole_sequences_is_refused(two_ranks, given, told):
    model = GSAForCausalLM(GSAConfig(**SIZES)).eval()
    parallel = apply_context_parallel(model)
    with pytest.raises(UsageError, match=told):
        model(IDS, **given)
    with parallel.suspended():
        assert model(IDS, **given).logits.shape == (1, 6, 9)


def test_stretches_shorter_than_a_convolution_are_refused(two_ranks):
    model = GSAForCausalLM(GSAConfig(**SIZES, use_short_conv=True))
    apply_context_parallel(model)
    with pytest.raises(UsageError, match="reaches 3 tokens back, but a process has 2"):
        model(IDS[:, :2])


def with_a_mixer_of_its_own():
    model = GSAForCausalLM(GSAConfig(**SIZES))
    model.model.layers[1].attn = torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    ("model", "ranks", "told"),
    [
        (
            lambda: GSAForCausalLM(GSAConfig(**SIZES, attn={"layers": [1]})),
            2,
            "layer 1 is softmax attention",
        ),
        (lambda: GSAForCausalLM(GSAConfig(**SIZES, token_mixer="attention")), 2, "layer 0 is softmax attention"),
        (with_a_mixer_of_its_own, 2, "layer 1 is of type Identity, which does not say"),
        (lambda: torch.nn.Linear(2, 2), 2, "needs a GSAForCausalLM or GSAModel, got Linear"),
        (lambda: GSAForCausalLM(GSAConfig(**SIZES)), 0, "no process group is initialised"),
    ],
)
def test_models_that_cannot_are_refused(monkeypatch, model, ranks, told):
    monkeypatch.setattr(exchange, "dist", Ranks(0, ranks))
    with pytest.raises(UsageError, match=told):
        apply_context_parallel(model())


def test_twice_is_refused(two_ranks):
    model = GSAForCausalLM(GSAConfig(**SIZES))
    apply_context_parallel(model)
    with pytest.raises(UsageError, match="apply it once"):
        apply_context_parallel(model)


def test_stretches_of_a_batch_are_the_batch():
    ids, targets = torch.arange(24).view(2, 12), torch.arange(24, 48).view(2, 12)
    batch = Batch(ids, targets, torch.tensor([0, 5, 12], dtype=torch.int32))
    parts = [stretch(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.input_ids for part in parts], 1), ids)
    assert torch.equal(torch.cat([part.targets for part in parts], 1), targets)
    assert all(part.cu_seqlens is batch.cu_seqlens for part in parts)


@pytest.mark.parametrize(("length", "told"), [(13, "10 or 15 tokens"), (3, "make them 5 tokens")])
def test_rows_that_cannot_be_cut_are_refused(length, told):
    with pytest.raises(UsageError, match=told):
        stretch(Batch(torch.zeros(1, length), torch.zeros(1, length)), 0, 5)
