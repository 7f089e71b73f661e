"""A call's kernels are compiled together before its first launch: the rehearsal launches what the call will launch."""

from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import ahead, launching, passes, plan  # noqa: E402
from flash_gsa.ops.triton.library import attention, linear_attention  # noqa: E402

BF16 = torch.bfloat16


def tensors(device="cpu", T=300, HQ=2, H=2, K=64, V=64, M=64, dtype=BF16, states=False, strength=False, packed=None):
    """(q, k, v, g, s, hk0, hv0, cu_seqlens) of one sequence; or two, `packed` says where their boundaries are."""

    def zeros(*size, dtype=dtype):
        return torch.zeros(1, *size, dtype=dtype, device=device, requires_grad=True)

    lengths = torch.tensor([0, *accumulate((100, T - 100))], dtype=torch.int32, device=packed) if packed else None
    s = zeros(T, H, M) if strength else None
    count = 2 if packed else 1
    hk0, hv0 = (zeros(count, H, M, size, dtype=torch.float32)[0] if states else None for size in (K, V))
    g = zeros(T, H, M, dtype=torch.float32)
    return zeros(T, HQ, K), zeros(T, H, K), zeros(T, H, V), g, s, hk0, hv0, lengths


def without_memory(given):
    """As on a GPU, where boundaries may stay on the CPU."""
    *inputs, lengths = given
    return *(None if x is None else x.to("meta") for x in inputs), lengths


CALLS = {
    "one head a group": {},
    "grouped": {"HQ": 4},
    "wide, several slices": {"K": 256, "V": 128},
    "s given": {"strength": True},
    "states": {"states": True},
    "packed": {"packed": "cpu"},
    "packed, states": {"packed": "cpu", "states": True},
    "many segments": {"T": 20_000, "H": 1, "HQ": 1},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
}


@pytest.fixture
def launched(monkeypatch):
    """What every launch's kernel is compiled for; nothing is launched."""
    found = []

    def note(variant, programs, arguments):
        kinds = tuple(x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        found.append((variant, programs, kinds))

    monkeypatch.setattr(launching, "launch", note)
    monkeypatch.setattr(ahead, "INTERPRETED", True)  # no rehearsal but the test's own
    return found


@pytest.mark.parametrize("keep", [True, False], ids=["with backward", "forward alone"])
@pytest.mark.parametrize("final", [False, True], ids=["", "final states"])
@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_the_rehearsal_launches_what_the_call_does(launched, sizes, final, keep):
    given, scale = tensors(**sizes), 0.5
    with torch.set_grad_enabled(keep):
        o, hkT, hvT = attention(*given, scale, final, False)
    if keep:
        torch.autograd.backward([o, hkT, hvT] if final else [o], [o, hkT, hvT] if final else [o])
    called = launched.copy()
    launched.clear()
    with torch.no_grad():
        passes._rehearsal(scale, final, keep, *without_memory(given))
    assert called
    assert launched == called


@pytest.mark.parametrize("final", [False, True], ids=["", "final states"])
@pytest.mark.parametrize("sizes", [CALLS[name] for name in ("grouped", "packed, states", "float32")])
def test_the_rehearsal_of_gated_linear_attention_does_too(launched, sizes, final):
    q, _, v, g, _, _, hv0, lengths = tensors(**sizes)
    k = torch.zeros_like(g, dtype=q.dtype, requires_grad=True)
    o, hT = linear_attention(q, k, v, g, hv0, lengths, 0.5, final)
    torch.autograd.backward([o, hT] if final else [o], [o, hT] if final else [o])
    called = launched.copy()
    launched.clear()
    with torch.no_grad():
        passes._linear_rehearsal(0.5, final, True, *without_memory((q, k, v, g, hv0, lengths)))
    assert called
    assert launched == called


@pytest.fixture
def rehearsals(monkeypatch):
    """The devices of what is rehearsed from now on, as if nothing had been."""
    monkeypatch.setattr(ahead, "_rehearsed", set())
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(ahead, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launching, "launch", lambda variant, programs, arguments: None)
    found = []
    rehearsal = passes._rehearsal

    def note(*call):
        found.append(call[3].device.type)
        rehearsal(*call)

    monkeypatch.setattr(passes, "_rehearsal", note)
    return found


@pytest.mark.parametrize("packed", [None, "cpu"], ids=["", "packed"])
def test_a_call_is_rehearsed_once(rehearsals, packed):
    given = tensors(packed=packed)
    for _ in range(3):
        attention(*given, 1.0, False, False)
    assert rehearsals == ["meta"]
    with torch.no_grad():
        attention(*given, 1.0, False, False)  # a forward alone has kernels of its own
    attention(*given, 1.0, True, False)  # and so has one that gives states back
    assert rehearsals == 3 * ["meta"]
    for _ in range(2):
        attention(*tensors(packed=packed, T=310), 1.0, False, False)
    # Of lengths the kernels know nothing, but a new length has a new plan.
    assert len(rehearsals) == 3


def test_boundaries_on_the_device_are_rehearsed_with_their_tables(launched):
    given = tensors(packed="cpu")
    with torch.no_grad():
        passes._rehearsal(1.0, False, True, *(None if x is None else x.to("meta") for x in given))
    names = [variant.kernel.fn.__name__ for variant, *_ in launched]
    assert names[:3] == ["first_parts", "sequences_of_parts", "prepare"]
    assert names.count("first_parts") == names.count("sequences_of_parts") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [None, "cpu", "cuda"], ids=["", "packed", "packed on the device"])
def test_after_the_first_forward_nothing_is_left_to_compile(monkeypatch, packed):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from triton.runtime.jit import JITFunction

    compiled, compile_one = [], JITFunction._do_compile

    def count(self, *given):
        compiled.append(self.fn.__name__)
        return compile_one(self, *given)

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    # Sizes of no other test, nor of another place of boundaries.
    given = tensors("cuda", K=96, V=72, M=36 if packed == "cuda" else 40, packed=packed)
    o, *_ = attention(*given, 1.0, False, False)
    kernels = len(compiled)
    of_tables = [name for name in compiled if name in ("first_parts", "sequences_of_parts")]
    assert packed == "cuda" or not of_tables
    assert kernels == 8 + len(of_tables)
    o.backward(torch.ones_like(o))
    attention(*given, 1.0, False, False)
    torch.cuda.synchronize()
    assert len(compiled) == kernels, compiled[kernels:]
