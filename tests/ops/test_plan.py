"""A plan is kept for calls of the same sizes and boundaries, and only for those."""

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import abc, plan, tiles

SIZES = {"B": 2, "T": 70, "HQ": 4, "H": 2, "K": 32, "V": 48, "M": 20}


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})


def plan_of(dtype=torch.bfloat16, has_s=False, cu_seqlens=None, linear=False, **changes):
    n = SIZES | changes
    sizes = {"q": (n["HQ"], n["K"]), "k": (n["H"], n["K"]), "v": (n["H"], n["V"]), "g": (n["H"], n["M"])}
    q, k, v, g = (torch.empty(n["B"], n["T"], *size, dtype=dtype) for size in sizes.values())
    return plan.plan_for(q, k, v, g, has_s, cu_seqlens, linear)


def test_the_same_sizes_have_the_same_plan():
    assert plan_of() is plan_of()


@pytest.mark.parametrize(
    "change",
    [{name: 2 * size} for name, size in SIZES.items()]
    + [{"dtype": torch.float32}, {"dtype": torch.float16}, {"has_s": True}, {"linear": True, "M": SIZES["K"]}],
    ids=str,
)
def test_whatever_differs_has_a_plan_of_its_own(change):
    first, other = plan_of(), plan_of(**change)
    assert other is not first
    assert (plan_of(), plan_of(**change)) == (first, other)
    T = SIZES["T"] * (2 if "T" in change else 1)
    fresh = plan_of(**change, cu_seqlens=torch.tensor([0, T])) if "B" not in change else other
    assert fresh.constants | {"PACKED": False} == other.constants


def test_plans_of_other_boundaries_find_what_was_launched():
    """To look for a compiled kernel takes the host as long as to launch three."""
    first = plan_of(B=1, cu_seqlens=torch.tensor([0, 30, 70]))
    assert plan_of(B=1, cu_seqlens=torch.tensor([0, 31, 70]))._variants is first._variants
    assert plan_of(B=1)._variants is not first._variants
    assert plan_of(B=1, cu_seqlens=torch.tensor([0, 30, 70]), has_s=True)._variants is not first._variants


def test_other_tiles_have_a_plan_of_their_own():
    first = plan_of()
    with tiles.using(replace(first.tiles, C=first.tiles.BT)):
        inside = plan_of()
        assert inside.tiles.C == first.tiles.BT
    assert inside is not first
    assert plan_of() is first


def test_packed_sequences_with_the_same_boundaries_have_the_same_plan():
    boundaries = torch.tensor([0, 30, 70])
    first = plan_of(B=1, cu_seqlens=boundaries)
    assert plan_of(B=1, cu_seqlens=boundaries.clone()) is first
    # The numbers count, not the tensor: this one is another from now on, and none was asked for tables yet.
    boundaries[1] = 40
    other = plan_of(B=1, cu_seqlens=boundaries)
    assert other is not first
    assert plan_of(B=1, cu_seqlens=torch.tensor([0, 30, 70])) is first
    for different in (boundaries.int(), torch.tensor([0, 20, 40, 70])):
        assert plan_of(B=1, cu_seqlens=different) not in (first, other)


def test_tables_are_of_the_boundaries_that_were_asked_for():
    for middle in (30, 10, 64, 30, 10):
        boundaries = torch.tensor([0, middle, 70], dtype=torch.int32)
        found, *_ = plan_of(B=1, cu_seqlens=boundaries).table
        assert found.tolist() == [0, middle, 70]
        boundaries.fill_(7)  # what becomes of them later is no matter
        assert plan_of(B=1, cu_seqlens=torch.tensor([0, middle, 70], dtype=torch.int32)).table[0] is found


def test_boundaries_elsewhere_than_on_the_cpu_are_planned_anew():
    """To compare them would wait for the device."""
    boundaries = torch.empty(3, dtype=torch.int32, device="meta")
    assert plan_of(B=1, cu_seqlens=boundaries) is not plan_of(B=1, cu_seqlens=boundaries)
    assert not plan._plans


def test_what_is_made_for_a_graph_or_on_another_stream_is_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
    boundaries, cuts, made = torch.tensor([0, 30, 70]), {}, []

    def kept():
        def make(own):
            made.append(own)
            return len(made)

        return plan.kept(cuts, (70,), torch.device("cuda"), boundaries, make)

    capturing, stream = False, 5
    assert [kept(), kept()] == [1, 1]
    assert made[0] is not boundaries
    stream = 6
    assert [kept(), kept()] == [2, 2]
    capturing = True
    assert [kept(), kept()] == [3, 4]
    capturing = False
    assert kept() == 2


def test_gates_of_abc_are_cut_as_before_too(monkeypatch):
    monkeypatch.setattr(abc, "_cuts", {})
    logits = torch.zeros(1, 70, 2, 8)
    first = abc.cut_for(logits, torch.tensor([0, 30, 70]))
    assert abc.cut_for(logits, torch.tensor([0, 30, 70])) is first
    assert abc.cut_for(logits, torch.tensor([0, 31, 70])) is not first
    assert abc.cut_for(logits, None) is abc.cut_for(logits.clone(), None)
    assert abc.cut_for(logits, None) is not abc.cut_for(logits[:, :60], None)


def test_no_more_plans_are_kept_than_said(monkeypatch):
    monkeypatch.setattr(plan, "KEPT", 3)
    for T in range(1, 9):
        plan_of(T=T)
        assert 1 <= len(plan._plans) <= 3


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from([0, 7, 8, 9, 16, 17]), st.integers(0, 70)), min_size=1, max_size=40))
def test_parts_of_packed_sequences(lengths):
    """Their tables name every part once and in order, and `count`, found without the lengths, is enough."""
    boundaries = torch.tensor([0, *accumulate(lengths)])
    T, C = sum(lengths), 8
    for span, beyond, parts_of in (
        (C, None, lambda n: max(1, -(-n // C))),
        (3 * C, None, lambda n: max(1, -(-n // (3 * C)))),
        (3 * C, C, lambda n: -(-n // (3 * C)) if n > C else 0),
    ):
        parts = plan.Parts(1, T, span, boundaries, beyond)
        sequence, first = parts.tables(torch.device("cpu"))
        wanted = [n for n, length in enumerate(lengths) for _ in range(parts_of(length))]
        assert first.tolist() == [0, *accumulate(map(parts_of, lengths))]
        assert first[-1] <= parts.count == len(sequence)
        assert sequence[: len(wanted)].tolist() == wanted
        # One sequence of so many tokens has as many parts.
        assert plan.Parts(2, T, span, None, beyond).count == 2 * (parts_of(T) if T else 0)


@pytest.mark.parametrize("lengths", [None, (70,), (0, 0, 70), (10,) * 7, (1,) * 70])
def test_there_are_as_many_states_between_chunks_however_tokens_are_cut(lengths):
    boundaries = None if lengths is None else torch.tensor([0, *accumulate(lengths)])
    of_it = plan_of(B=1, cu_seqlens=boundaries)
    C, one = of_it.tiles.C, (SIZES["H"], SIZES["M"], SIZES["K"])
    between, with_ends = (of_it.state_shapes(at_ends)[0] for at_ends in (False, True))
    # Packed, an upper bound that needs no look at the lengths.
    assert between == ((SIZES["T"] - 1) // C if lengths is None else SIZES["T"] // C, *one)
    assert with_ends == (between[0] + (1 if lengths is None else len(lengths)), *one)


def test_what_has_no_states_in_between_is_not_walked(monkeypatch):
    launched = []
    monkeypatch.setattr(plan.Plan, "_launch", lambda self, kernel, programs, *rest: launched.append(programs))
    like = torch.empty(0)
    short = plan_of(T=plan_of().tiles.C)
    short.walk(None, short.tiles.states, False, like, ())
    assert not launched
    short.walk(None, short.tiles.states, True, like, ())
    long = plan_of(T=1 + plan_of().tiles.C)
    long.walk(None, long.tiles.states, False, like, ())
    walks = SIZES["H"] * long.slices(long.tiles.states)
    assert launched == [SIZES["B"] * walks, SIZES["B"] * walks]
