"""What must hold whatever the numbers are: causality bit for bit, pieces, packing, steps, determinism."""

from itertools import pairwise

import pytest
import torch

from flash_gsa import gated_slot_attention, gated_slot_attention_step

from .helpers import EPS, Case, call, make, run, with_gradients
from .judge import distance

CLOSE = {"rtol": 0, "atol": 64 * EPS}  # against results of size 1, summed in another order


def cut(x: dict, start: int, end: int) -> dict:
    return {name: tensor[:, start:end] if name in "qkvgs" else tensor for name, tensor in x.items()}


def to(x: dict, device) -> dict:
    return {name: tensor.to(device) for name, tensor in x.items()}


PREFIXES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 190, 199)


@pytest.mark.parametrize("strong_prefix", [False, True])
@pytest.mark.parametrize(
    "case",
    [Case(T=200, B=1, HQ=4, H=2), Case(T=200, B=2, K=1, V=1, M=1), Case(T=200, HQ=1, H=1, K=16, V=16, M=32)],
    ids=str,
)
def test_a_prefix_does_not_depend_on_what_follows_by_a_bit(backend, device, case, strong_prefix):
    x, other = make(case), make(case, seed=1)
    if strong_prefix:
        x["g"][:, 20:22, :, 0], x["g"][:, 90] = -70.0, -1e5
    before = call(backend, to(x, device), case)[0]
    for t in PREFIXES:
        for change in ("everything", "everything and strong gates", "gates only"):
            y = {name: tensor.clone() for name, tensor in x.items()}
            if change != "gates only":
                for name in "qkvg":
                    y[name][:, t:] = 3 * other[name][:, t:]
            if change == "everything and strong gates":
                y["g"][:, t:] = -55.0
            if change == "gates only":
                y["g"][:, t:] = -1e30
            after = call(backend, to(y, device), case)[0]
            assert torch.equal(before[:, :t], after[:, :t]), (t, change)
            assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("strong", [False, True])
def test_a_packed_sequence_does_not_depend_on_the_others_by_a_bit(backend, device, strong):
    case = Case(lengths=(70, 30, 0, 90, 8))
    x, other = make(case), make(case, seed=1)
    o, hk, hv = call(backend, to(x, device), case)
    start = 0
    for n, length in enumerate(case.lengths):
        y = {name: 2 * tensor for name, tensor in other.items()}
        if strong:
            y["g"] = y["g"] - 65
        for name in "qkvg":
            y[name][:, start : start + length] = x[name][:, start : start + length]
        y["hk"][n], y["hv"][n] = x["hk"][n], x["hv"][n]
        changed = call(backend, to(y, device), case)
        mine = slice(start, start + length)
        assert torch.equal(o[:, mine], changed[0][:, mine])
        assert torch.equal(hk[n], changed[1][n])
        assert torch.equal(hv[n], changed[2][n])
        start += length


@pytest.mark.parametrize("strength", [False, True])
def test_packed_is_a_loop_over_sequences(backend, device, strength):
    case = Case(lengths=(0, 17, 64, 1, 0, 130, 5, 0), HQ=4, H=2, strength=strength, scale=0.6)
    x = make(case)
    packed = run(backend, x, case, device)
    start = 0
    for n, length in enumerate(case.lengths):
        single = Case(T=length, B=1, HQ=4, H=2, strength=strength, scale=0.6)
        y = cut(x, start, start + length) | {"hk": x["hk"][n : n + 1], "hv": x["hv"][n : n + 1]}
        results = call(backend, to(y, device), single)
        for name, got in zip(("o", "hk", "hv"), results, strict=True):
            want = packed[name][:, start : start + length] if name == "o" else packed[name][n : n + 1]
            torch.testing.assert_close(got.cpu(), want, **CLOSE)
        start += length


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_boundaries_may_be_of_either_integer_type_and_on_the_device(backend, device, kind):
    case = Case(lengths=(40, 0, 30))
    x = to(make(case), device)
    o, *_ = call(backend, x, case)
    bounds = torch.tensor([0, 40, 40, 70], dtype=kind, device=device)
    again, _ = gated_slot_attention(
        x["q"], x["k"], x["v"], x["g"], initial_state=(x["hk"], x["hv"]), cu_seqlens=bounds, backend=backend
    )
    assert torch.equal(o, again)


@pytest.mark.parametrize("H", [1, 2, 4])
def test_how_many_chunks_are_strong_changes_no_bit_of_them(backend, device, H):
    """A matrix product for one of them may add up in another order than a product for two."""
    case = Case(T=33, B=1, HQ=H, H=H, K=16, V=16, M=32)
    for seed in range(5):
        x = to(make(case, seed), device)
        random = torch.randn(x["g"].shape, generator=torch.Generator().manual_seed(seed))
        x["g"] = torch.where(random > 1, -1e4, -0.1).to(device)
        x["g"][:, 32] = -0.1
        stronger = x | {"g": x["g"].clone()}
        stronger["g"][:, 32] = -100.0
        o, other = (call(backend, y, case)[0][:, :32] for y in (x, stronger))
        assert torch.equal(o, other)


@pytest.mark.parametrize("bounds", [(0, 150), (0, 1, 2, 150), (0, 64, 128, 150), (0, 37, 37, 99, 150), (0, 149, 150)])
def test_pieces_carried_through_states_are_one_pass(backend, device, bounds):
    case = Case(T=150, HQ=4, H=2, strength=True)
    x = to(make(case), device)
    x["g"][:, 70, :, 3] = -200.0

    def in_pieces(x):
        outputs, state = [], (x["hk"], x["hv"])
        for start, end in pairwise(bounds):
            piece = cut(x, start, end) | {"hk": state[0], "hv": state[1]}
            o, *state = call(backend, piece, Case(T=end - start, HQ=4, H=2, strength=True))
            outputs.append(o)
        return torch.cat(outputs, dim=1), *state

    whole, pieces = with_gradients(lambda z: call(backend, z, case), x), with_gradients(in_pieces, x)
    for name, want in whole.items():
        torch.testing.assert_close(pieces[name], want, rtol=64 * EPS, atol=64 * EPS * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("strength", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_are_the_sequence(backend, device, dtype, strength):
    case = Case(T=70, HQ=4, H=2, strength=strength, scale=0.6)
    x = to(make(case), device)
    double = dtype == torch.float64
    x = {n: y.double() if double else y.to(dtype) if n in "qkv" else y for n, y in x.items()}
    whole = call(backend, x, case)
    outputs, state = [], (x["hk"], x["hv"])
    for t in range(case.T):
        token = [x[name][:, t] for name in ("q", "k", "v", "g")]
        o, state = gated_slot_attention_step(
            *token, x["s"][:, t] if strength else None, state=state, scale=0.6, backend=backend
        )
        outputs.append(o)
    assert outputs[0].dtype == dtype
    o = torch.stack(outputs, 1)
    if backend == "triton" and dtype == torch.bfloat16:  # a sequence by products of 16-bit factors, a step in float32
        for one, other in zip((o, *state), whole, strict=True):
            assert distance(one, other) <= 2 * torch.finfo(dtype).eps
    else:
        torch.testing.assert_close(o, whole[0], rtol=2 * torch.finfo(dtype).eps, atol=64 * EPS)
        torch.testing.assert_close(state, whole[1:], **CLOSE)


def test_a_step_leaves_the_state_it_was_given_alone(backend, device):
    case = Case(T=2)
    x = to(make(case), device)
    state = (x["hk"], x["hv"])
    kept = [part.clone() for part in state]
    _, new = gated_slot_attention_step(*(x[n][:, 0] for n in ("q", "k", "v", "g")), state=state, backend=backend)
    after_one = [part.clone() for part in new]
    gated_slot_attention_step(*(x[n][:, 1] for n in ("q", "k", "v", "g")), state=new, backend=backend)
    for part, before, later, after in zip(state, kept, new, after_one, strict=True):
        assert torch.equal(part, before)
        assert torch.equal(later, after)
        assert part.untyped_storage().data_ptr() != later.untyped_storage().data_ptr()


def test_the_sequence_leaves_its_inputs_alone(backend, device):
    case = Case(T=130, strength=True)
    x = to(make(case), device)
    x["g"][:, 40] = -1e6
    kept = {name: tensor.clone() for name, tensor in x.items()}
    run(backend, x, case, device)
    with torch.no_grad():
        call(backend, x, case)
    for name, tensor in x.items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("case", [Case(T=130, strength=True), Case(lengths=(70, 0, 66, 3))], ids=str)
def test_two_runs_give_the_same_bits(backend, device, case):
    x = make(case)
    x["g"][:, 40] = -1e6
    first, second = run(backend, x, case, device), run(backend, x, case, device)
    for name, y in first.items():
        assert torch.equal(y, second[name]), name


@pytest.mark.parametrize(
    "case", [Case(T=130), Case(T=9, state=False), Case(lengths=(70, 0, 66, 3)), Case(lengths=(0, 5, 0))], ids=str
)
def test_uninitialised_memory_is_never_read(backend, device, case, monkeypatch):
    x = make(case)
    x["g"][:, 3] = -1e6
    clean = run(backend, x, case, device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(backend, x, case, device)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, y in clean.items():
        assert torch.equal(y, poisoned[name]), name


def test_strides_do_not_matter(backend, device):
    case = Case(T=70, HQ=2, H=2, strength=True)
    x = make(case)
    plain = run(backend, x, case, device)

    def strided(tensor):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0)
        wide[..., ::2] = tensor
        turned = wide[..., ::2].transpose(1, 2).contiguous().transpose(1, 2)
        return turned if tensor.dim() == 4 and tensor.shape[1] > 2 else wide[..., ::2]

    views = {name: strided(tensor).to(device) for name, tensor in x.items()}
    assert not any(views[name].is_contiguous() for name in "qkvg")
    results = with_gradients(
        lambda z: call(backend, {n: _again(y, views[n]) for n, y in z.items()}, case), to(x, device)
    )
    for name, want in plain.items():
        torch.testing.assert_close(results[name].cpu(), want, rtol=64 * EPS, atol=64 * EPS * float(want.abs().max()))


def _again(leaf: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`leaf` with the strides of `like`."""
    return torch.empty_strided(like.shape, like.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def test_expanded_inputs(backend, device):
    case = Case(T=70, B=3, HQ=2, H=2)
    x = to(make(case), device)
    x = {
        n: y[:1].expand_as(y) if n in "qk" else y[..., :1].expand_as(y) if n in "vg" else y[:1].expand_as(y)
        for n, y in x.items()
    }
    dense = {name: tensor.contiguous() for name, tensor in x.items()}
    for got, want in zip(call(backend, x, case), call(backend, dense, case), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_no_grad_gives_the_same_bits(backend, device):
    case = Case(T=130)
    x = to(make(case), device)
    x["g"][:, 40] = -1e6
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    with torch.no_grad():
        quiet = call(backend, leaves, case)
    assert not any(y.requires_grad for y in quiet)
    with torch.inference_mode():
        inferred = call(backend, x, case)
    for loud, *others in zip(call(backend, leaves, case), quiet, inferred, strict=True):
        assert loud.requires_grad
        assert all(torch.equal(loud, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(backend, device, dtype):
    case = Case(T=70)
    x = to(make(case), device)
    token = [x[n][:, 0] for n in ("q", "k", "v", "g")]
    plain = call(backend, x, case)
    step = gated_slot_attention_step(*token, state=(x["hk"], x["hv"]), backend=backend)
    with torch.autocast(device.type, dtype):
        inside = call(backend, x, case)
        step_inside = gated_slot_attention_step(*token, state=(x["hk"], x["hv"]), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert torch.equal(step[0], step_inside[0])


def test_a_batch_without_tokens_or_rows(backend, device):
    for case in (Case(T=0), Case(T=5, B=0), Case(lengths=(0, 0))):
        x = to(make(case), device)
        o, hk, hv = call(backend, x, case)
        assert o.shape == (case.B, case.T, case.HQ, case.V)
        assert torch.equal(hk, x["hk"])
        assert torch.equal(hv, x["hv"])
