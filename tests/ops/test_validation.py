"""Every bad input is refused by name, with what was expected."""

import pytest
import torch

from flash_gsa import (
    abc_gates,
    abc_gates_step,
    gated_linear_attention_step,
    gated_slot_attention,
    gated_slot_attention_step,
)
from flash_gsa.errors import UsageError
from flash_gsa.ops.validation import check_values_of

B, T, HQ, H, K, V, M = 2, 6, 4, 2, 3, 5, 7
ONE = torch.zeros(1, 1, 3)


def arguments(**changes):
    x = {
        "q": torch.randn(B, T, HQ, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "g": -torch.rand(B, T, H, M),
        "s": torch.rand(B, T, H, M),
    }
    return x | changes


def gates_with(value: float) -> torch.Tensor:
    g = -torch.rand(B, T, H, M)
    g[1, 2, 1, 3] = value
    return g


REFUSED = [
    ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
    ({"s": 1.0}, "s must be a torch.Tensor, got float"),
    ({"q": torch.randn(B, T, K)}, r"q must have 4 dimensions \[B, T, HQ, K\], got \[2, 6, 3\]"),
    ({"k": torch.randn(B, T, K)}, r"k must have 4 dimensions \[B, T, H, K\]"),
    ({"v": torch.randn(T, H, V)}, r"v must have 4 dimensions \[B, T, H, V\]"),
    ({"g": torch.randn(B, T, H)}, r"g must have 4 dimensions \[B, T, H, M\]"),
    ({"q": torch.ones(B, T, HQ, K, dtype=torch.int64)}, "q must be floating point.*got torch.int64"),
    ({"g": torch.ones(B, T, H, M, dtype=torch.bool)}, "g must be floating point.*got torch.bool"),
    ({"k": torch.randn(B, T, H, K, device="meta")}, "on one device: q is on cpu, k on meta"),
    ({"k": torch.randn(B, T, H, K).bfloat16()}, r"one dtype: q is torch.float32, k is torch.bfloat16.*k.to\(q.dtype\)"),
    ({"v": torch.randn(B, T, H, V).double()}, "one dtype.*v is torch.float64"),
    ({"v": torch.randn(B, T + 1, H, V)}, r"v must agree with q in \[B, T\] = \[2, 6\], got \[2, 7\]"),
    ({"g": -torch.rand(1, T, H, M)}, r"g must agree with q in \[B, T\] = \[2, 6\], got \[1, 6\]"),
    ({"s": torch.rand(B, T, 1, M)}, "s must have k's 2 heads, got 1"),
    ({"v": torch.randn(B, T, 4, V)}, "v must have k's 2 heads, got 4"),
    ({"q": torch.randn(B, T, 3, K)}, "H must divide the number of query heads HQ, got H = 2, HQ = 3"),
    ({"q": torch.randn(B, T, 0, K)}, "H must divide.*HQ = 0"),
    ({"q": torch.randn(B, T, HQ, K + 1)}, "one head dimension K: q has 4, k has 3"),
    ({"s": torch.rand(B, T, H, M + 1)}, "s must have g's number of slots M = 7, got 8"),
    ({"v": torch.randn(B, T, H, 0)}, "K, V and M must be at least 1, got K = 3, V = 0, M = 7"),
    ({"g": gates_with(0.25)}, r"g is a log forget gate and must be ≤ 0.*largest value is 0.25.*logsigmoid"),
    ({"g": gates_with(float("nan"))}, "g contains NaN"),
    ({"scale": float("nan")}, "scale must be a finite Python number, got nan"),
    ({"scale": float("-inf")}, "scale must be a finite Python number"),
    ({"scale": torch.tensor(1.0)}, "scale must be a finite Python number, got tensor"),
    ({"scale": "1"}, "scale must be a finite Python number, got '1'"),
    ({"scale": 10**400}, "scale must be a finite Python number, got 1000"),
    ({"backend": None}, "backend must be a name, got None; choose 'auto' or one of .*reference"),
    (
        {"backend": "chunck"},
        "backend 'chunck' does not exist; choose 'auto' or one of .*reference.*Did you mean 'chunk'",
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_refused(change, words):
    with pytest.raises(UsageError, match=words):
        gated_slot_attention(**arguments(**change))


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([0, 6], "cu_seqlens must be an int32 or int64 tensor, got list"),
        (torch.tensor([0.0, 6.0]), "int32 or int64 tensor, got torch.float32"),
        (
            torch.tensor([[0, 6]]),
            r"shape \[S\+1\] for S ≥ 1 packed sequences, got \[1, 2\]; for one sequence of length T",
        ),
        (torch.tensor([0]), r"shape \[S\+1\].*got \[1\]"),
        (torch.tensor([1, 6]), "must start with 0, got 1"),
        (torch.tensor([0, 4]), "must end with T = 6, got 4"),
        (torch.tensor([0, 7]), "must end with T = 6, got 7"),
        (torch.tensor([0, 4, 3, 6]), r"must not decrease: cu_seqlens\[1\] = 4 but cu_seqlens\[2\] = 3"),
    ],
)
def test_refused_boundaries(cu_seqlens, words):
    one = {name: x[:1] for name, x in arguments().items()}
    with pytest.raises(UsageError, match=words):
        gated_slot_attention(**one, cu_seqlens=cu_seqlens)


def test_packed_needs_one_row():
    with pytest.raises(UsageError, match=r"batch dimension must be 1.*got B = 2; reshape"):
        gated_slot_attention(**arguments(), cu_seqlens=torch.tensor([0, 3, 6]))


HK, HV = torch.zeros(B, H, K, M), torch.zeros(B, H, M, V)
STATES = [
    (HK, "must be a pair .hk, hv., got Tensor"),
    ((HK,), "must be a pair"),
    ((HK, None), r"hv must have shape \[N, H, M, V\] = \[2, 2, 7, 5\], got NoneType"),
    ((HK.transpose(2, 3), HV), r"hk must have shape \[N, H, K, M\] = \[2, 2, 3, 7\], got \[2, 2, 7, 3\]"),
    ((HK[:1], HV), "N is the batch size, or with cu_seqlens the number of packed sequences"),
    ((HK, HV.bfloat16()), r"hv must be torch.float32 for torch.float32 inputs, got torch.bfloat16; convert with"),
    ((HK.to("meta"), HV), "hk is on meta, but q is on cpu"),
]


@pytest.mark.parametrize(("state", "words"), STATES, ids=[words[:30] for _, words in STATES])
def test_refused_states(state, words):
    with pytest.raises(UsageError, match=f"initial_state.*{words}"):
        gated_slot_attention(**arguments(), initial_state=state)
    token = {name: x[:, 0] for name, x in arguments().items()}
    with pytest.raises(UsageError, match=f"state.*{words}"):
        gated_slot_attention_step(**token, state=state)


def test_states_of_float64_inputs_are_float64():
    x = {name: tensor.double() for name, tensor in arguments().items()}
    with pytest.raises(UsageError, match=r"hk must be torch.float64 for torch.float64 inputs"):
        gated_slot_attention(**x, initial_state=(HK, HV))


def test_a_packed_call_needs_a_state_a_sequence():
    one = {name: x[:1] for name, x in arguments().items()}
    with pytest.raises(UsageError, match=r"= \[3, 2, 3, 7\], got \[2, 2, 3, 7\]"):
        gated_slot_attention(**one, cu_seqlens=torch.tensor([0, 2, 2, 6]), initial_state=(HK, HV))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(B, T, HQ, K)}, r"q must have 3 dimensions \[B, HQ, K\]"),
        ({"g": torch.rand(B, H, M)}, "g is a log forget gate"),
        ({"v": torch.randn(B + 1, H, V)}, r"v must agree with q in \[B\] = \[2\], got \[3\]"),
        ({"scale": float("inf")}, "scale must be a finite"),
        ({"backend": "triton?"}, "backend 'triton\\?' does not exist"),
    ],
)
def test_refused_steps(change, words):
    token = {name: x[:, 0] for name, x in arguments().items()} | {"state": (HK, HV)} | change
    with pytest.raises(UsageError, match=words):
        gated_slot_attention_step(**token)


@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_a_step_of_no_sequences(backend):
    x = {name: tensor[:0, 0] for name, tensor in arguments().items()}
    state = torch.zeros(0, H, K, M), torch.zeros(0, H, M, V)
    o, new = gated_slot_attention_step(**x, state=state, backend=backend)
    assert o.shape == (0, HQ, V)
    assert [part.shape for part in new] == [part.shape for part in state]
    o, new = gated_linear_attention_step(
        x["q"], x["k"], x["v"], -x["k"].abs(), state=torch.zeros(0, H, K, V), backend=backend
    )
    assert (o.shape, new.shape) == ((0, HQ, V), (0, H, K, V))


def test_a_normalizer_that_is_no_tensor():
    for call in (lambda: abc_gates(torch.zeros(1, 2, 1, 3), initial_normalizer=[1]), lambda: abc_gates_step(ONE, [1])):
        with pytest.raises(UsageError, match=r"the normalizer must be a torch.Tensor .*got list"):
            call()


def test_gates_of_nothing_and_of_minus_infinity_are_fine():
    gated_slot_attention(**arguments(g=gates_with(float("-inf"))))
    gated_slot_attention(**arguments(g=torch.zeros(B, T, H, M)))
    gated_slot_attention(**{name: x[:, :0] for name, x in arguments().items()})


def test_values_are_looked_at_on_the_cpu_always_and_elsewhere_under_the_switch(monkeypatch):
    class Elsewhere:
        is_meta = False
        device = torch.device("cuda")

    assert check_values_of(torch.zeros(1))
    monkeypatch.delenv("FLASH_GSA_CHECK_VALUES", raising=False)
    assert not check_values_of(Elsewhere())
    for value, looked_at in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FLASH_GSA_CHECK_VALUES", value)
        assert check_values_of(Elsewhere()) is looked_at
    assert not check_values_of(torch.zeros(1, device="meta"))


@pytest.mark.gpu
def test_values_on_a_gpu_are_checked_under_the_switch_only(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = {name: tensor.cuda() for name, tensor in arguments(g=gates_with(0.25)).items()}
    monkeypatch.delenv("FLASH_GSA_CHECK_VALUES", raising=False)
    gated_slot_attention(**x)
    monkeypatch.setenv("FLASH_GSA_CHECK_VALUES", "1")
    with pytest.raises(UsageError, match="g is a log forget gate"):
        gated_slot_attention(**x)
