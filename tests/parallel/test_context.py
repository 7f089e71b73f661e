"""Sequences over several processes give what one process gives: values, states and every gradient."""

from dataclasses import replace

import pytest
import torch

from flash_gsa.errors import UsageError
from flash_gsa.parallel import context_parallel_gated_slot_attention
from tests.parallel.ranks import CASES, INTERPRETED, ON_GPUS, boundaries, inputs, whole

pytestmark = pytest.mark.timeout(600)  # all processes' cases run once, for all tests

NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def each(cases, first=()):
    """All cases; `first`: marks of the first, in which those of all are run."""
    pairs = [(ranks, case) for ranks, several in cases.items() for case in several]
    pairs[0] = pytest.param(*pairs[0], marks=first)
    return pytest.mark.parametrize(("ranks", "case"), pairs, ids=lambda x: getattr(x, "name", x))


@each(CASES)
def test_as_one_process(found, ranks, case):
    check(case, found[:ranks])


@each(INTERPRETED)
def test_kernels_as_one_process(found_by_kernels, ranks, case):
    check(case, found_by_kernels[:ranks])


@pytest.mark.gpu
@each(ON_GPUS, first=pytest.mark.long)
def test_gpus_as_one_process(found_on_gpus, ranks, case):
    if len(found_on_gpus) < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    check(case, found_on_gpus[:ranks])


def check(case, found):
    wanted, parts = whole(replace(case, backend="chunk")), [one[case.name] for one in found]
    for name, want in wanted.items():
        if name.startswith("final"):
            got = parts[-1][name]
        elif name in ("dhk", "dhv"):
            got = parts[0][name]
        else:
            got = torch.cat([part[name] for part in parts], dim=1)
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        error = (got.double() - want.double()).norm()
        assert error <= NEAR[case.dtype] * max(want.double().norm(), 1.0), f"{name}: off by {error:.1e}"


def test_the_cases_are_not_trivial():
    for cases in CASES.values():
        for case in cases:
            gradients = [y for name, y in whole(case).items() if name.startswith("d")]
            assert all(y.isfinite().all() for y in gradients)
            assert any(y.abs().max() > 1e-3 for y in gradients)
            if case.lengths is not None:
                assert int(boundaries(case)[-1]) == sum(case.tokens)


class Ranks:
    """torch.distributed as one of several processes sees it."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks

    def is_available(self):
        return True

    def is_initialized(self):
        return self.ranks > 0

    def get_rank(self, group):
        return self.rank

    def get_world_size(self, group):
        return self.ranks


@pytest.mark.parametrize(
    ("rank", "ranks", "change", "told"),
    [
        (0, 0, {}, "no process group is initialised; start the program with torchrun"),
        (-1, 2, {}, "not part of the group"),
        (1, 2, {"initial_state": "given"}, "initial_state was given on rank 1"),
        (0, 2, {"initial_state": "wrong"}, "initial_state"),
        (0, 2, {"cu_seqlens": torch.tensor([0, 80]), "output_final_state": True}, "no initial or final states"),
        (0, 2, {"cu_seqlens": torch.tensor([0, 40])}, "must end with T = 160, got 40"),
        (0, 2, {"cu_seqlens": torch.tensor([0, 160]), "rows": 2}, "batch dimension must be 1"),
        (0, 2, {"g": torch.zeros(1)}, "g"),
        (1, 2, {"tokens": 0}, "every process needs tokens, got q .* on rank 1"),
        (1, 2, {"states": "forget"}, "states must be 'keep' or 'recompute'"),
        (1, 2, {"backend": "chnk"}, "Did you mean 'chunk'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(monkeypatch, rank, ranks, change, told):
    from flash_gsa.parallel import exchange

    monkeypatch.setattr(exchange, "dist", Ranks(rank, ranks))
    change = dict(change)
    rows, tokens = change.pop("rows", 1), change.pop("tokens", None)
    x = {name: y[:rows, :tokens] for name, y in inputs(CASES[2][0]).items() if name != "do"}
    state = {"given": (torch.zeros(1, 2, 5, 3, dtype=torch.float64), torch.zeros(1, 2, 3, 6, dtype=torch.float64))}
    state["wrong"] = state["given"][::-1]
    if "initial_state" in change:
        change["initial_state"] = state[change["initial_state"]]
    with pytest.raises(UsageError, match=told):
        context_parallel_gated_slot_attention(**(x | change))


@pytest.mark.parametrize("T", [0, 1, 7, 8, 9, 30])
def test_sums_and_products_in_pieces(monkeypatch, T):
    from flash_gsa.parallel import context

    monkeypatch.setattr(context, "PIECE", 4)
    monkeypatch.setattr(context, "AT_ONCE", 8)
    g = -torch.rand(2, T, 3, 5, dtype=torch.float64)
    wanted = torch.stack([g[:, t + 1 :].sum(1) for t in range(T)], dim=1) if T else g
    assert torch.allclose(context._sums_behind(g), wanted, rtol=1e-14, atol=1e-14)
    w, x = (torch.randn(2, T, 3, width, dtype=torch.float64, requires_grad=True) for width in (5, 6))
    grad = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    results = []
    for function in (context._WeightedSum.apply, lambda w, x: torch.einsum("bthm,bthd->bhmd", w, x)):
        total = function(w, x)
        results.append([total, *torch.autograd.grad(total, [w, x], grad)])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-13, atol=1e-13)


def test_gates_that_erase_everything_are_sums_too():
    from flash_gsa.parallel.context import _sums_behind

    g = torch.full((1, 4, 1, 1), float("-inf"))
    assert _sums_behind(g).flatten().tolist() == [float("-inf")] * 3 + [0.0]
