"""Choosing a backend by name and by itself, and adding one."""

import pytest
import torch

from flash_gsa import gated_slot_attention, gated_slot_attention_step
from flash_gsa.errors import UsageError
from flash_gsa.ops import Backend, Problem, backend_names, explain, register_backend, registry
from flash_gsa.ops.reference import reference_forward

PROBLEM = Problem(B=1, T=8, HQ=2, H=2, K=4, V=4, M=4, dtype=torch.float32, device="cpu")


@pytest.fixture
def added(monkeypatch):
    """Register a backend for one test: `added(**fields)`; returns the list of its calls."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))

    def add(name="extra", priority=100, unsupported=lambda problem: None, **more):
        calls = []

        def forward(*arguments):
            calls.append(arguments)
            return reference_forward(*arguments)

        register_backend(Backend(name=name, forward=forward, unsupported=unsupported, priority=priority, **more))
        return calls

    return add


def inputs():
    return torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4), -torch.rand(1, 8, 2, 4)


def test_the_faster_backend_comes_first():
    names = backend_names()
    assert names.index("chunk") < names.index("reference") == len(names) - 1
    assert registry.select("auto", PROBLEM).name == "chunk"
    assert [name for name, _ in explain(PROBLEM)] == names
    assert dict(explain(PROBLEM))["chunk"] is None


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'refrence' does not exist; .*chunk.*reference.* Did you mean 'reference'\?"):
        gated_slot_attention(*inputs(), backend="refrence")


def test_a_new_backend_is_used_with_no_other_change(added):
    calls = added()
    x = inputs()
    o, _ = gated_slot_attention(*x, scale=0.5)
    assert len(calls) == 1
    assert backend_names()[0] == "extra"
    assert torch.equal(o, gated_slot_attention(*x, scale=0.5, backend="reference")[0])
    gated_slot_attention(*x, backend="chunk")
    assert len(calls) == 1
    _, _, _, _, s, scale, state, final, bounds = calls[0]
    assert (s, scale, state, final, bounds) == (None, 0.5, None, False, None)


def test_backends_of_tests_do_not_stay():
    assert "extra" not in backend_names()


def test_a_backend_of_low_priority_is_not_chosen(added):
    calls = added(priority=-1)
    gated_slot_attention(*inputs())
    assert calls == []
    gated_slot_attention(*inputs(), backend="extra")
    assert len(calls) == 1


def test_a_backend_that_cannot_is_passed_over_and_says_why(added):
    asked = []

    def refuses(problem):
        asked.append(problem)
        return f"slots must be a power of two, got {problem.M}"

    calls = added(unsupported=refuses)
    gated_slot_attention(*inputs())
    assert calls == []
    assert asked[0] == PROBLEM
    assert explain(PROBLEM)[0] == ("extra", "slots must be a power of two, got 4")
    with pytest.raises(
        UsageError, match=r"'extra' cannot run this: slots must be a power of two, got 4. These can: .*chunk.*reference"
    ):
        gated_slot_attention(*inputs(), backend="extra")


def test_when_none_can_every_reason_is_given(added):
    registry._backends.clear()
    for name in ("first", "second"):
        added(name=name, unsupported=lambda problem, name=name: f"{name}'s reason")
    with pytest.raises(UsageError, match=r"no backend can run this problem \(first: first's reason; second: second's"):
        gated_slot_attention(*inputs())


@pytest.mark.parametrize("own", [False, True])
def test_steps_use_the_backend_or_else_the_reference(added, own):
    steps = []

    def step(q, k, v, g, s, state, scale):
        steps.append(scale)
        return q, state

    added(step=step if own else None)
    q, k, v, g = (x[:, 0] for x in inputs())
    state = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    o, _ = gated_slot_attention_step(q, k, v, g, state=state, scale=2.0, backend="extra")
    assert steps == ([2.0] if own else [])
    assert torch.equal(o, q) is own


def test_the_problem_names_what_the_call_is(added):
    asked = []
    added(unsupported=lambda problem: asked.append(problem))
    q = torch.randn(1, 6, 4, 2).bfloat16()
    x = q, torch.randn(1, 6, 2, 2).bfloat16(), torch.randn(1, 6, 2, 3).bfloat16(), -torch.rand(1, 6, 2, 5)
    gated_slot_attention(*x, cu_seqlens=torch.tensor([0, 6]))
    assert asked == [Problem(1, 6, 4, 2, 2, 3, 5, torch.bfloat16, "cpu", packed=True)]
