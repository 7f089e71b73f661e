"""The kernel of gated linear attention's step, in Triton's interpreter and on a GPU.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and the GPU's.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import gated_linear_attention_step
from flash_gsa.ops.reference_linear import reference_linear_step

from .interpreter import run_in_interpreter

triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import step_linear  # noqa: E402
from flash_gsa.ops.triton.step import MOST_AT_ONCE, Split  # noqa: E402
from flash_gsa.ops.triton.step_linear import NARROWEST, choose, launch, triton_linear_step  # noqa: E402

EPS = torch.finfo(torch.float32).eps


def make(B=2, HQ=2, H=1, K=20, V=33, tau=8.0, one_gate=False, dtype=torch.float32, device="cpu"):
    """(q, k, v, g), state of one token; q, k, v in `dtype`, g as the step gets it: K numbers, or one, repeated."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(device)

    q, k, v = (x.to(dtype) for x in (normal(B, HQ, K), normal(B, H, K), normal(B, H, V)))
    g = F.logsigmoid(normal(B, H, 1 if one_gate else K)) / tau
    return [q, k, v, g.expand_as(k)], normal(B, H, K, V)


def check(token, state, scale=0.7, split=None):
    """The step against float64, at most twice as far from it as PyTorch's float32; the state it was given stays."""
    kept = state.clone()
    if split is None:
        o, new = triton_linear_step(*token, state, scale)
    else:
        new = torch.empty_like(state)
        o = launch(*token, state, new, scale, split)
    assert torch.equal(state, kept)
    assert o.dtype == token[0].dtype
    assert new.dtype == state.dtype
    assert new.is_contiguous()
    exact = reference_linear_step(*(x.double() for x in token), state.double(), scale)
    plain = reference_linear_step(*(x.float() for x in token), state, scale)
    for got, want, usual in zip((o, new), exact, plain, strict=True):
        assert got.isfinite().all()
        rounding = 16 * EPS if got.dtype == torch.float32 else 0.6 * torch.finfo(got.dtype).eps
        assert (got.double() - want).norm() <= 2 * (usual.double() - want).norm() + rounding * want.norm()


def test_how_heads_are_split():
    for groups in (1, 4, 32, 256, 4096):
        for V in (16, 33, 128, 130, 192, 320, 512):
            for R in (1, 2, 4, 8):
                split = choose(groups, V, R, 132)
                width = triton.next_power_of_2(triton.cdiv(V, split.programs))
                assert split.programs == 1 or width >= NARROWEST
                assert split.programs == 1 or (split.programs - 1) * width < V, "a program without columns"
                assert split.programs == 1 or groups < 3 * 132 or width > NARROWEST, "heads were enough"
    assert choose(4, 512, 1, 132).programs == 16
    assert choose(4096, 512, 1, 132).programs == 8


def test_which_heads_have_a_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(step_linear, "step", lambda *x: asked.append(x) or (None, None))
    for R, differentiable in ((MOST_AT_ONCE, False), (MOST_AT_ONCE + 1, False), (1, True)):
        token, state = make(HQ=R)
        triton_linear_step(*token, state.requires_grad_(differentiable), 0.7)
    assert [x[0].shape[1] for x in asked] == [MOST_AT_ONCE]


if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    GLA = {"HQ": 4, "H": 4, "K": 256, "V": 512}
    HGRN2 = {"HQ": 16, "H": 16, "K": 128, "V": 128}
    RETNET = {"HQ": 8, "H": 8, "K": 256, "V": 512, "one_gate": True}

    @pytest.fixture
    def cuda() -> torch.device:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return torch.device("cuda", torch.cuda.current_device())

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        ("sizes", "dtype"),
        [
            (GLA | {"B": 1}, torch.bfloat16),
            (GLA | {"B": 64}, torch.bfloat16),
            (HGRN2 | {"B": 12}, torch.float16),
            (RETNET | {"B": 3}, torch.bfloat16),
            ({"B": 200, "HQ": 32, "H": 8, "K": 128, "V": 128}, torch.float32),
            ({"HQ": 16, "H": 2, "K": 100, "V": 36}, torch.float32),
            ({"HQ": 40, "H": 2, "K": 64, "V": 64}, torch.bfloat16),
            ({"K": 1, "V": 1, "HQ": 1}, torch.float32),
            ({"B": 1024, "HQ": 2, "H": 2, "K": 64, "V": 64}, torch.bfloat16),
        ],
        ids=str,
    )
    def test_accuracy_on_a_gpu(cuda, sizes, dtype):
        check(*make(dtype=dtype, device=cuda, **sizes))

    @pytest.mark.gpu
    @pytest.mark.parametrize("programs", [1, 2, 16])
    @pytest.mark.parametrize("warps", [1, 2, 4])
    def test_any_split_on_a_gpu(cuda, programs, warps):
        split = Split(programs, tile=1024, warps=warps, stages=3)
        for sizes in (GLA, {"HQ": 6, "H": 3, "K": 100, "V": 50}):
            check(*make(**sizes, device=cuda), split=split)

    @pytest.mark.gpu
    @pytest.mark.parametrize("B", [1, 8, 200])
    def test_runs_and_replays_of_a_graph_give_the_same_bits(cuda, B):
        token, state = make(**GLA, B=B, device=cuda)
        want, new = triton_linear_step(*token, state, 0.7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, same = triton_linear_step(*token, state, 0.7)
        for _ in range(20):
            again, other = triton_linear_step(*token, state, 0.7)
            graph.replay()
            assert all(torch.equal(want, x) for x in (again, o))
            assert all(torch.equal(new, x) for x in (other, same))

    @pytest.mark.gpu
    def test_states_of_more_elements_than_32_bits_count(cuda, gpu_room):
        """In place: 9 GB. The first and the last sequence are compared."""
        gpu_room(11)
        H, K, V = (GLA[name] for name in ("H", "K", "V"))
        B = 2**31 // (H * K * V) + 1

        def normal(*shape):
            return torch.empty(shape, device=cuda).normal_()

        g = F.logsigmoid(normal(B, H, K)) / 8
        token = [normal(B, H, K), normal(B, H, K), normal(B, H, V), g]
        state = normal(B, H, K, V)
        assert state[:-1].numel() >= 2**31
        kept = [state[end].clone() for end in (slice(0, 1), slice(B - 1, B))]
        o = launch(*token, state, state, 0.7)
        for end, before in zip((slice(0, 1), slice(B - 1, B)), kept, strict=True):
            want, after = reference_linear_step(*(x[end] for x in token), before, 0.7)
            torch.testing.assert_close(o[end], want, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(state[end], after, rtol=1e-6, atol=1e-6)

else:

    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"K": 1, "V": 1},
            {"HQ": 6, "H": 3, "K": 64, "V": 48},
            {"HQ": 8, "K": 33, "V": 16, "B": 1},
            {"K": 128, "V": 130, "B": 1, "one_gate": True},
            {"HQ": 10, "H": 5, "K": 16, "V": 512, "B": 1, "one_gate": True},
            {"HQ": 20, "H": 2},
        ],
        ids=str,
    )
    def test_accuracy(sizes):
        check(*make(**sizes))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("programs", [1, 2, 4])
    def test_any_split(programs, dtype):
        for sizes in ({"K": 40, "V": 100}, {"HQ": 4, "K": 64, "V": 64}):
            check(*make(**sizes, dtype=dtype), split=Split(programs, tile=512, warps=1, stages=2))

    @pytest.mark.parametrize("one_gate", [False, True])
    @pytest.mark.parametrize("tau", [0.02, 1e5])
    def test_strong_and_weak_gates(tau, one_gate):
        check(*make(tau=tau, one_gate=one_gate))

    def test_rows_that_are_forgotten():
        token, state = make()
        token[3] = token[3].clone()
        token[3][:, :, ::2] = -torch.inf
        token[3][1] = -1e30
        check(token, state)

    def test_no_sequences():
        token, state = make(B=0)
        o, new = triton_linear_step(*token, state, 0.7)
        assert o.shape == (0, 2, 33)
        assert new.shape == state.shape

    def test_views_of_larger_tensors():
        token, state = make(B=4, HQ=4, H=2)
        plain = triton_linear_step(*token, state, 0.7)
        wide = [torch.stack([x, -x], 1)[:, 0] for x in token]
        turned = state.transpose(2, 3).contiguous().transpose(2, 3)
        for views in ((wide, state), (token, turned), ([x[::2] for x in token], state[::2])):
            found = triton_linear_step(*views[0], views[1], 0.7)
            for got, want in zip(found, plain, strict=True):
                assert torch.equal(got, want if got.shape == want.shape else want[::2])

    @pytest.mark.parametrize("one_gate", [False, True])
    def test_the_operator_takes_it(monkeypatch, one_gate):
        launched, own = [], step_linear.launch
        monkeypatch.setattr(step_linear, "launch", lambda *x: launched.append(x) or own(*x))
        (q, k, v, g), state = make(one_gate=one_gate)
        given = g[..., :1] if one_gate else g
        found = gated_linear_attention_step(q, k, v, given, state=state, scale=0.7, backend="triton")
        assert len(launched) == 1
        wanted = gated_linear_attention_step(q, k, v, given, state=state, scale=0.7, backend="reference")
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want)

    def test_differentiated_steps_are_the_reference_s():
        token, state = make()
        token[0].requires_grad_()
        o, _ = gated_linear_attention_step(*token, state=state, backend="triton")
        o.sum().backward()
        assert token[0].grad.abs().sum() > 0

    def test_compiles_without_a_break():
        function = torch.compile(
            lambda token, state: gated_linear_attention_step(*token, state=state, backend="triton"),
            fullgraph=True,
            backend="aot_eager",
        )
        with torch.no_grad():
            for B in (2, 3):
                token, state = make(B=B)
                found = function(token, state)
                wanted = gated_linear_attention_step(*token, state=state, backend="triton")
                assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
