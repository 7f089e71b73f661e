"""The Triton kernels in Triton's interpreter, on the CPU, in float32.

The interpreter is chosen when triton is imported, so these tests run in a process of their own: collected
without TRITON_INTERPRET=1, this file is one test that starts it.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import gated_slot_attention

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

EPS = torch.finfo(torch.float32).eps


def results(backend, dtype, inputs, s, state, cu_seqlens):
    """o, final states and every gradient, for a loss with fixed random weights."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    s = None if s is None else s.to(dtype).requires_grad_()
    state = None if state is None else tuple(x.to(dtype).requires_grad_() for x in state)
    o, final = gated_slot_attention(
        *leaves, s, scale=0.7, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    random = torch.Generator().manual_seed(1)
    outputs = [o, *final]
    loss = sum((x * torch.randn(x.shape, generator=random).to(dtype)).sum() for x in outputs)
    wanted = [*leaves, *([] if s is None else [s]), *(state or ())]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss, wanted))


def make(B=1, T=70, HQ=2, H=1, K=20, V=33, M=9, tau=8.0, N=None, with_s=False, with_state=True):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    q, k, v = normal(B, T, HQ, K), normal(B, T, H, K), normal(B, T, H, V)
    g = F.logsigmoid(normal(B, T, H, M)) / tau
    s = torch.rand(B, T, H, M, generator=random) if with_s else None
    state = (normal(N or B, H, K, M), normal(N or B, H, M, V)) if with_state else None
    return [q, k, v, g], s, state


def check(inputs, s, state, cu_seqlens=None):
    exact = results("reference", torch.float64, inputs, s, state, cu_seqlens)
    plain = results("chunk", torch.float32, inputs, s, state, cu_seqlens)
    got = results("triton", torch.float32, inputs, s, state, cu_seqlens)
    for i, (want, usual, x) in enumerate(zip(exact, plain, got, strict=True)):
        assert x.isfinite().all(), i
        allowed = 2 * (usual.double() - want).norm() + 16 * EPS * want.norm()
        assert (x.double() - want).norm() <= allowed, f"result {i}"


if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(600)
    def test_in_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout

else:

    def test_grouped_queries_and_batch():
        check(*make(B=2, HQ=4, H=2))

    def test_powers_of_two_without_state():
        check(*make(T=40, HQ=1, K=16, V=16, M=16, with_state=False))

    def test_given_strengths():
        check(*make(HQ=1, with_s=True))

    def test_strong_gates():
        check(*make(T=45, tau=0.1))

    def test_one_huge_gate_among_small_ones():
        inputs, s, state = make(T=45, with_s=True)
        inputs[3][:, 20, :, 3] = -1e4
        inputs[3][:, 5] = -70
        check(inputs, s, state)

    def test_packed_with_empty_sequences():
        inputs, s, state = make(N=6)
        check(inputs, s, state, torch.tensor([0, 0, 3, 3, 40, 70, 70]))
