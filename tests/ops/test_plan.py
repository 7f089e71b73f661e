"""A plan is kept for calls of the same sizes, and only for those."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import plan, tiles

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
    fresh = plan_of(**change, cu_seqlens=torch.tensor([0, SIZES["T"]])) if "B" not in change else other
    assert fresh.constants | {"PACKED": False} == other.constants


def test_other_tiles_have_a_plan_of_their_own():
    first = plan_of()
    with tiles.using(replace(first.tiles, C=first.tiles.BT)):
        inside = plan_of()
        assert inside.tiles.C == first.tiles.BT
    assert inside is not first
    assert plan_of() is first


def test_packed_sequences_are_planned_anew():
    cu_seqlens = torch.tensor([0, 30, 70])
    assert plan_of(B=1, cu_seqlens=cu_seqlens) is not plan_of(B=1, cu_seqlens=cu_seqlens)
    assert not plan._plans


def test_no_more_plans_are_kept_than_said(monkeypatch):
    monkeypatch.setattr(plan, "KEPT", 3)
    for T in range(1, 9):
        plan_of(T=T)
        assert 1 <= len(plan._plans) <= 3
