"""Second derivatives: right with the backends in PyTorch, and refused, not left out, by what has a backward of its own.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and those in PyTorch.
"""

import os

import pytest
import torch
from torch.autograd import Function, forward_ad
from torch.utils.checkpoint import checkpoint

from flash_gsa import abc_gates, gated_linear_attention, gated_slot_attention, gated_slot_attention_step
from flash_gsa.errors import UsageError
from flash_gsa.models.loss import next_token_loss
from flash_gsa.ops.once import once_differentiable
from flash_gsa.ops.pointwise import log_gates

from .interpreter import run_in_interpreter

T = 70
OUTGOING = ("by the outgoing gradient",)


def inputs(strength=1.0, dtype=torch.float64, M=4):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, 8, dtype=dtype, generator=random, requires_grad=True) for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(1, T, 1, M, dtype=dtype, generator=random)) * strength
    return q, k, v, g.requires_grad_()


def second(call, given, by):
    """Gradients of |gradients by `by`|² of the sum of squares of all that `call` returns."""
    first = torch.autograd.grad(sum((x**2).sum() for x in call(*given)), by, create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in first), given)


def slots(backend, bounds=None):
    def call(q, k, v, g):
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        o, state = gated_slot_attention(q, k, v, g, output_final_state=True, backend=backend, cu_seqlens=cu_seqlens)
        return o, *state

    return call


def matrix(backend):
    def call(q, k, v, g):
        return gated_linear_attention(q, k, v, g, output_final_state=True, backend=backend)

    return call


class Square(Function):
    """x², with the derivative that somebody wrote."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        (x,) = ctx.saved_tensors
        return 2 * x * dx, None


if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

    @pytest.mark.parametrize("call", [slots("triton"), matrix("triton")], ids=["slots", "matrix"])
    def test_kernels_refuse(call):
        given = inputs(dtype=torch.float32, M=8)
        with pytest.raises(UsageError, match=r"differentiated once.*backend='chunk' or 'reference'"):
            second(call, given, given[1:2])

    def by_attention(q, k, v, g):
        return gated_slot_attention(q, k, v, g, backend="triton")[0]

    def by_matrix(q, k, v, g):
        return gated_linear_attention(q, k, v, g, backend="triton")[0]

    def by_gates(q, k, v, g):
        return abc_gates(v)[1]

    @pytest.mark.parametrize("call", [by_attention, by_matrix, by_gates, lambda *x: log_gates(x[2], 16.0)])
    def test_forward_mode_is_refused_and_not_zero(call):
        given = [x.detach() for x in inputs(dtype=torch.float32, M=8)]
        with forward_ad.dual_level():
            given[2] = forward_ad.make_dual(given[2], torch.ones_like(given[2]))
            with pytest.raises(RuntimeError, match=r"forward.*AD"):
                call(*given)

    def test_forward_mode_of_a_step_is_that_of_the_reference():
        q, k, v, g = (x.detach()[:, 0] for x in inputs(dtype=torch.float32, M=8))
        state = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
        found = []
        with forward_ad.dual_level():
            v = forward_ad.make_dual(v, torch.ones_like(v))
            for backend in ("reference", "triton"):
                o, _ = gated_slot_attention_step(q, k, v, g, state=state, backend=backend)
                found.append(forward_ad.unpack_dual(o).tangent)
        assert torch.equal(*found)
        assert found[0].norm() > 0

else:

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    @pytest.mark.parametrize("strength", [0.125, 40.0])
    @pytest.mark.parametrize("bounds", [None, (0, 40, 40, T)])
    def test_chunk_is_differentiable_twice(bounds, strength):
        given = inputs(strength)
        for by in (given[1:2], given):
            expected, found = (second(slots(backend, bounds), given, by) for backend in ("reference", "chunk"))
            for x, y in zip(expected, found, strict=True):
                assert (x - y).norm() <= 1e-9 * x.norm()

    @pytest.mark.parametrize("strength", [0.125, 40.0])
    def test_gated_linear_attention_by_chunks_too(strength):
        given = inputs(strength, M=8)
        for by in (given[1:2], given):
            expected, found = (second(matrix(backend), given, by) for backend in ("reference", "chunk"))
            for x, y in zip(expected, found, strict=True):
                assert (x - y).norm() <= 1e-9 * x.norm()

    def test_a_third_derivative_by_chunks():
        q, k, v, g = inputs()
        found = []
        for backend in ("reference", "chunk"):
            x = (gated_slot_attention(q, k, v, g, backend=backend)[0] ** 2).sum()
            for by in (k, g):
                x = (torch.autograd.grad(x, by, create_graph=True)[0] ** 2).sum()
            found.append(torch.autograd.grad(x, g)[0])
        assert (found[0] - found[1]).norm() <= 1e-9 * found[0].norm()

    @pytest.mark.parametrize("how", ["by the input", "backward", "by the outgoing gradient", "checkpointed"])
    def test_a_derivative_that_nobody_wrote_is_refused(how):
        x, w = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        y = checkpoint(Square.apply, x, 1, use_reentrant=False) if how == "checkpointed" else Square.apply(x, 1)
        (dx,) = torch.autograd.grad(w * y, x, create_graph=True)
        assert dx.item() == 12
        again = dx.backward if how == "backward" else lambda: torch.autograd.grad(dx, w if how in OUTGOING else x)
        with pytest.raises(UsageError, match="Square can be differentiated once"):
            again()

    def test_a_graph_of_gradients_that_nobody_uses_costs_nothing():
        x = torch.tensor(3.0, requires_grad=True)
        (dx,) = torch.autograd.grad(Square.apply(x, 1), x, create_graph=True)
        assert dx.item() == 6
        (dx,) = torch.autograd.grad(Square.apply(x, 1), x)
        assert not dx.requires_grad

    def test_the_loss_refuses():
        hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (5, 11))
        loss = next_token_loss(hidden, weight, torch.arange(5), at_once=22)
        with pytest.raises(UsageError, match="The loss can be differentiated once"):
            torch.autograd.grad(loss, hidden, create_graph=True)
