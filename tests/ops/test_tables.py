"""Tables of packed sequences made by kernels are those that PyTorch makes; a backward uses those of its forward.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and those that need a GPU.
"""

import os
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import abc, library, plan, tables

from .helpers import Case, make
from .interpreter import run_in_interpreter

SMALL, LARGE = 8, 24


def compared(lengths, device, dtype=torch.int32):
    """Tables by kernels for boundaries on `device` against those of PyTorch, for what plans ask for."""
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=dtype)
    for span, beyond in ((SMALL, None), (LARGE, None), (LARGE, SMALL)):
        parts = plan.Parts(1, sum(lengths), span, boundaries, beyond)
        sequence, first = parts.tables(torch.device("cpu"))
        found = tables.parts_of(boundaries.to(device), span, beyond, parts.count)
        assert all(x.dtype == torch.int32 for x in found)
        assert found[0].tolist() == sequence.tolist()
        assert found[1].tolist() == first.tolist()


LENGTHS = [[0], [5], [0, 0, 0], [SMALL, SMALL + 1, 0], [100, 0, 7, 300, 1], [1] * 70, [9] * 33, [0] * 31 + [1]]

if os.environ.get("TRITON_INTERPRET") == "1":

    @pytest.mark.parametrize("block", [4, 32, tables.BLOCK])
    @pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:6]))
    def test_tables_by_kernels(lengths, block, monkeypatch):
        monkeypatch.setattr(tables, "BLOCK", block)
        compared(lengths, "cpu")

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.one_of(st.sampled_from([0, 7, 8, 9, 24, 25]), st.integers(0, 90)), min_size=1, max_size=40))
    def test_tables_of_random_sequences(lengths):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "BLOCK", 16)
            compared(lengths, "cpu", torch.int64)

    @pytest.mark.parametrize("final", [False, True])
    def test_the_operator_with_tables_by_kernels_has_the_same_bits(final, monkeypatch):
        case = Case(lengths=(0, 3, 200, 1, 0, 34), HQ=1, H=1, K=16, V=16, M=4)
        x = {name: tensor.float().requires_grad_() for name, tensor in make(case).items()}
        q, k, v, logits = (x[name] for name in "qkvg")

        def results():
            g, s, _ = abc.abc_gates(logits, None, case.cu_seqlens)
            o, *states = library.attention(q, k, v, g, s, None, None, case.cu_seqlens, 1.0, final, False)
            return o, *(states if final else ()), *torch.autograd.grad(o, (q, k, v, logits), v)

        def by_kernels(self, device):
            used.append(self.span)
            return tables.parts_of(self.cu_seqlens, self.span, self.beyond, self.count)

        used, expected = [], results()
        monkeypatch.setattr(plan.Parts, "tables", by_kernels)
        monkeypatch.setattr(plan, "_plans", {})
        monkeypatch.setattr(abc, "_cuts", {})
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
        assert len(used) >= 3

    def test_one_plan_for_forward_and_backward(monkeypatch):
        case = Case(lengths=(0, 3, 20), HQ=1, H=1, K=16, V=16, M=4)
        x = {name: tensor.float().requires_grad_() for name, tensor in make(case).items()}
        asked = []
        for module, name in ((library, "plan_for"), (abc, "cut_for")):
            own = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *given, own=own, name=name, **rest: (asked.append(name), own(*given, **rest))[1]
            )
        cu = case.cu_seqlens
        g, s, _ = abc.abc_gates(x["g"], None, cu)
        o, *_ = library.attention(x["q"], x["k"], x["v"], g, s, None, None, cu, 1.0, False, False)
        o.sum().backward()
        o, _ = library.linear_attention(x["q"], x["k"], x["v"], -x["k"].abs(), None, cu, 1.0, False)
        o.sum().backward()
        assert x["g"].grad is not None
        assert asked == ["cut_for", "plan_for", "plan_for"]

    def test_boundaries_that_are_written_over_before_the_backward(monkeypatch):
        case = Case(lengths=(3, 20), HQ=1, H=1, K=16, V=16, M=4)
        x = {name: tensor.float().requires_grad_() for name, tensor in make(case).items()}
        cu = case.cu_seqlens
        o, *_ = library.attention(x["q"], x["k"], x["v"], -x["g"].abs(), None, None, None, cu, 1.0, False, False)
        cu[1] = 5
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()

else:

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("lengths", [*LENGTHS, [3] * 5000, [0, 10**6, 0, 100]], ids=lambda ns: str(ns[:6]))
    def test_tables_on_a_gpu(lengths, dtype):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        compared(lengths, "cuda", dtype)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_boundaries_on_the_gpu_and_on_the_cpu_give_the_same_bits(dtype):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        case = Case(lengths=(0, 300, 1, 0, 129, 700, 0), HQ=2, H=1, K=64, V=64, M=32)
        x = {name: tensor.cuda() for name, tensor in make(case).items()}
        q, k, v, g = (x[name].bfloat16() for name in "qkvg")
        logits = g.float()

        def results(cu):
            leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, logits)]
            gates, s, _ = abc.abc_gates(leaves[3], None, cu)
            o, *final = library.attention(*leaves[:3], gates, s, None, None, cu, 1.0, True, False)
            return o, *final, *torch.autograd.grad(o, leaves, q)

        cu = case.cu_seqlens.to(dtype)
        for expected, found in zip(results(cu), results(cu.cuda()), strict=True):
            assert torch.equal(expected, found)
