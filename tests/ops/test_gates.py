"""ABC as gates: the operator with `abc_gates` is attention over softmax-normalised writes."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from flash_gsa import abc_gates, abc_gates_step, gated_slot_attention, gated_slot_attention_step
from flash_gsa.errors import UsageError

from .helpers import EPS

B, T, H, M, K, V = 2, 40, 2, 5, 3, 4
NOTHING = float("-inf")


def inputs(dtype=torch.float64):
    return (
        torch.randn(B, T, H, K, dtype=dtype),
        torch.randn(B, T, H, K, dtype=dtype),
        torch.randn(B, T, H, V, dtype=dtype),
        torch.randn(B, T, H, M, dtype=dtype) * 2,
    )


def by_definition(q, k, v, logits) -> np.ndarray:
    """ABC: slot m at time t is the mean of keys (values) so far with weights softmax_{j≤t}(l_jm)."""
    q, k, v, logits = (x.numpy() for x in (q, k, v, logits))
    o = np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        weights = np.exp(logits[b, : t + 1, h] - logits[b, : t + 1, h].max(0))
        weights /= weights.sum(0)
        scores = weights.T @ k[b, : t + 1, h] @ q[b, t, h]
        p = np.exp(scores - scores.max())
        o[b, t, h] = (p / p.sum()) @ (weights.T @ v[b, : t + 1, h])
    return o


def test_is_attention_with_bounded_memory_control(backend):
    q, k, v, logits = inputs()
    g, s = abc_gates(logits)
    o, _ = gated_slot_attention(q, k, v, g, s, backend=backend)
    np.testing.assert_allclose(o.numpy(), by_definition(q, k, v, logits), rtol=1e-10, atol=1e-11)


def test_equal_logits_are_the_running_mean():
    g, s = abc_gates(torch.zeros(1, 6, 1, 1))
    n = torch.arange(1.0, 7.0)
    torch.testing.assert_close(s.flatten(), 1 / n)
    torch.testing.assert_close(g.flatten()[1:], torch.log((n - 1) / n)[1:])
    assert g.flatten()[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_and_strengths_share_one(dtype):
    logits = inputs()[3].to(dtype)
    g, s = abc_gates(logits)
    assert g.dtype == s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (g <= 0).all()
    # From the second token on, what is written replaces what is forgotten.
    torch.testing.assert_close(s[:, 1:], -torch.expm1(g[:, 1:]))


@pytest.mark.parametrize("bounds", [(0, 40), (0, 1, 40), (0, 13, 14, 40), (0, 0, 39, 40)])
def test_pieces_carried_through_the_normalizer_are_one_pass(bounds):
    logits = inputs()[3]
    g, s, z = abc_gates(logits, output_final_normalizer=True)
    found, carried = [], None
    for start, end in pairwise(bounds):
        *gates, carried = abc_gates(logits[:, start:end], initial_normalizer=carried, output_final_normalizer=True)
        found.append(gates)
    torch.testing.assert_close(torch.cat([piece[0] for piece in found], 1), g)
    torch.testing.assert_close(torch.cat([piece[1] for piece in found], 1), s)
    torch.testing.assert_close(carried, z)
    torch.testing.assert_close(z, logits.logsumexp(1))


def test_steps_are_the_sequence():
    q, k, v, logits = inputs()
    g, s, z = abc_gates(logits, output_final_normalizer=True)
    o, _ = gated_slot_attention(q, k, v, g, s)
    carried = None
    state = torch.zeros(B, H, K, M, dtype=q.dtype), torch.zeros(B, H, M, V, dtype=q.dtype)
    for t in range(T):
        kept = None if carried is None else carried.clone()
        before = carried
        gt, st, carried = abc_gates_step(logits[:, t], carried)
        assert before is None or torch.equal(before, kept)
        torch.testing.assert_close(gt, g[:, t])
        torch.testing.assert_close(st, s[:, t])
        ot, state = gated_slot_attention_step(q[:, t], k[:, t], v[:, t], gt, st, state=state)
        torch.testing.assert_close(ot, o[:, t])
    torch.testing.assert_close(carried, z)


def test_packed_is_a_loop_over_sequences():
    logits = inputs()[3][:1]
    lengths = (0, 7, 0, 32, 1, 0)
    z0 = torch.randn(len(lengths), H, M, dtype=torch.float64)
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    for initial in (None, z0):
        g, s, z = abc_gates(logits, initial_normalizer=initial, output_final_normalizer=True, cu_seqlens=bounds)
        for n, (start, end) in enumerate(pairwise(bounds.tolist())):
            own = None if initial is None else initial[n : n + 1]
            want = abc_gates(logits[:, start:end], initial_normalizer=own, output_final_normalizer=True)
            torch.testing.assert_close((g[:, start:end], s[:, start:end], z[n : n + 1]), want)


def test_a_normalizer_of_nothing_is_a_new_sequence():
    logits = inputs(torch.float32)[3]
    nothing = torch.full((B, H, M), NOTHING, requires_grad=True)
    leaf = logits.clone().requires_grad_()
    g, s, z = abc_gates(leaf, initial_normalizer=nothing, output_final_normalizer=True)
    for got, want in zip((g, s, z), abc_gates(logits, output_final_normalizer=True), strict=True):
        assert torch.equal(got, want)
    (g.sum() + s.square().sum() + z.sum()).backward()
    assert leaf.grad.isfinite().all()
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))
    step = abc_gates_step(logits[:, 0], nothing.detach())
    for got, want in zip(step, abc_gates_step(logits[:, 0]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["rising", "falling", "jumps", "spike", "constant"])
def test_huge_logits_stay_finite_and_accurate(backend, kind):
    q, k, v, _ = inputs(torch.float32)
    t = torch.linspace(-1, 1, T)[None, :, None, None].expand(B, T, H, M)
    logits = (
        1e4
        * {
            "rising": t,
            "falling": -t,
            "jumps": torch.randn(B, T, H, M).sign(),
            "spike": (t > 0.9).float() - (t < -0.9).float(),
            "constant": torch.ones_like(t),
        }[kind]
    )
    logits = logits.clone().requires_grad_()
    g, s = abc_gates(logits)
    o, _ = gated_slot_attention(q, k, v, g, s, backend=backend)
    want = by_definition(*(x.double() for x in (q, k, v, logits.detach())))
    # The normalizer is a float32 near 1e4: good to 1e4 half units, and so are its exponentials.
    assert abs(o.detach().double().numpy() - want).max() <= 1e4 * EPS * T
    o.square().sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [None, (3, 0, 3)])
def test_gradients_agree_with_finite_differences(lengths):
    logits = torch.randn(1, 6, 1, 2, dtype=torch.float64, requires_grad=True)
    bounds = None if lengths is None else torch.tensor([0, *np.cumsum(lengths)])
    z = torch.randn(1 if lengths is None else 3, 1, 2, dtype=torch.float64, requires_grad=True)

    def gates(x, z0=None):
        return abc_gates(
            x, initial_normalizer=z0, output_final_normalizer=lengths is None or z0 is not None, cu_seqlens=bounds
        )

    assert torch.autograd.gradcheck(gates, (logits,))
    assert torch.autograd.gradcheck(gates, (logits, z))
    assert torch.autograd.gradcheck(
        abc_gates_step, (logits[:, 0].detach().requires_grad_(), z[:1].detach().requires_grad_())
    )


@pytest.mark.parametrize("lengths", [None, (3, 0, 17), (0, 0, 20), (1,) * 20])
def test_torch_compile_finds_no_break(lengths):
    logits = torch.randn(1, 20, 1, 2)
    bounds = None if lengths is None else torch.tensor([0, *np.cumsum(lengths)])
    z = torch.randn(1 if lengths is None else len(lengths), 1, 2)

    def gates(x, z0, bounds):
        return abc_gates(x, initial_normalizer=z0, output_final_normalizer=True, cu_seqlens=bounds)

    found = torch.compile(gates, fullgraph=True, backend="aot_eager")(logits, z, bounds)
    torch.testing.assert_close(found, gates(logits, z, bounds))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": [1.0]}, "logits must be a floating-point tensor.*got list"),
        ({"logits": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "floating-point tensor.*int64"),
        ({"logits": torch.zeros(1, 4, 2)}, r"\[B, T, H, M\], got torch.float32 \[1, 4, 2\]"),
        ({"initial_normalizer": torch.zeros(1, 2, 4)}, r"normalizer must have shape \[1, 2, 3\].*got \[1, 2, 4\]"),
        ({"initial_normalizer": torch.zeros(1, 2, 3).double()}, "normalizer must have.*float32.*got.*float64"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must end with T = 4, got 3"),
    ],
)
def test_refusals(change, words):
    arguments = {"logits": torch.zeros(1, 4, 2, 3)} | change
    with pytest.raises(UsageError, match=words):
        abc_gates(**arguments)


def test_refusals_of_a_step():
    with pytest.raises(UsageError, match=r"\[B, H, M\]"):
        abc_gates_step(torch.zeros(1, 4, 2, 3))
    with pytest.raises(UsageError, match="normalizer must have shape"):
        abc_gates_step(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
