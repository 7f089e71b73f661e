"""The decoding step of every backend: in place and not, states in bfloat16, what is refused."""

import pytest
import torch

from flash_gsa import gated_slot_attention_step
from flash_gsa.errors import UsageError

from .helpers import EPS, Case, make, recurrence, skip_unless_able

CASE = Case(T=1, B=3, HQ=4, H=2, K=20, V=12, M=9, scale=0.7)


def one_token(device="cpu", dtype=torch.float32, case=CASE):
    """(q, k, v, g, s), (hk, hv), and what `helpers` call these."""
    x = {name: tensor.to(device, dtype if name in "qkv" else None) for name, tensor in make(case).items()}
    return [x[n][:, 0] if n in x else None for n in "qkvgs"], (x["hk"], x["hv"]), x


def step(backend, token, state, **options):
    return gated_slot_attention_step(*token, state=state, scale=CASE.scale, backend=backend, **options)


def copies(state, dtype=None):
    return tuple(x.to(dtype or x.dtype, copy=True) for x in state)


@pytest.mark.parametrize("strength", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gives_the_same_bits(backend, device, dtype, strength):
    case = Case(T=1, B=3, HQ=4, H=2, K=20, V=12, M=9, strength=strength)
    token, state, x = one_token(device, case=case)
    skip_unless_able(backend, x, case)
    state, mine = copies(state, dtype), copies(state, dtype)
    versions = [part._version for part in mine]
    o, new = step(backend, token, state)
    again, same = step(backend, token, mine, in_place=True)
    assert torch.equal(o, again)
    for part, updated, returned, version in zip(new, mine, same, versions, strict=True):
        assert torch.equal(part, updated)
        assert returned is updated
        assert updated._version > version, "a graph that saved the state would not notice"


@pytest.mark.parametrize("in_place", [False, True])
def test_bfloat16_states_are_rounded_once_a_token(backend, device, in_place):
    token, state, x = one_token(device)
    skip_unless_able(backend, x, CASE)
    state = copies(state, torch.bfloat16)
    exact = recurrence(x | {"hk": state[0], "hv": state[1]}, CASE, torch.float64)
    o, new = step(backend, token, state, in_place=in_place)
    assert o.dtype == torch.float32
    # o is read from the state in float32, before it is rounded.
    assert (o.double() - exact[0][:, 0]).norm() <= 16 * EPS * exact[0].norm()
    for part, want in zip(new, exact[1:], strict=True):
        assert part.dtype == torch.bfloat16
        assert ((part.double() - want).abs() <= 1.01 * 2**-8 * want.abs()).all()


def test_inference_mode_and_no_grad_give_the_bits_of_a_differentiable_step(backend, device):
    token, state, x = one_token(device)
    skip_unless_able(backend, x, CASE)
    o, new = step(backend, token, state)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet, silent = step(backend, token, copies(state), in_place=True)
        assert torch.equal(o, quiet)
        assert all(torch.equal(a, b) for a, b in zip(new, silent, strict=True))


def test_gradients_flow_through_state_and_inputs(backend, device):
    token, state, x = one_token(device)
    skip_unless_able(backend, x, CASE)
    leaves = [y.clone().requires_grad_() for y in (*token[:4], *state)]
    o, (hk, hv) = step(backend, [*leaves[:4], None], leaves[4:])
    found = torch.autograd.grad(o.sum() + hk.square().sum() + hv.square().sum(), leaves)
    leaves = [y.double().detach().requires_grad_() for y in leaves]
    o, (hk, hv) = gated_slot_attention_step(*leaves[:4], state=leaves[4:], scale=CASE.scale, backend="reference")
    wanted = torch.autograd.grad(o.sum() + hk.square().sum() + hv.square().sum(), leaves)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["KM", "MK"])
def test_either_order_of_hk_in_memory(backend, device, order):
    token, (hk, hv), x = one_token(device)
    skip_unless_able(backend, x, CASE)
    exact = recurrence(x, CASE, torch.float64)
    if order == "MK":
        hk = hk.transpose(2, 3).contiguous().transpose(2, 3)
    o, new = step(backend, token, (hk, hv))
    for got, want in zip((o[:, None], *new), exact, strict=True):
        assert (got.double() - want).norm() <= 16 * EPS * want.norm()


def refused(words, *, state=None, **options):
    token, given, _ = one_token()
    with pytest.raises(UsageError, match=words):
        gated_slot_attention_step(*options.pop("token", token), state=state or given, **options)


def test_in_place_is_refused_where_a_gradient_is_wanted():
    token, (hk, hv), _ = one_token()
    refused(
        "overwrites state's hv, which requires grad; give its .detach", state=(hk, hv.requires_grad_()), in_place=True
    )
    token[1].requires_grad_()
    refused("has no gradient, but an input requires grad; call it under torch.no_grad", token=token, in_place=True)
    with torch.no_grad():
        gated_slot_attention_step(*token, state=(hk, hv.detach()), in_place=True)


def test_in_place_is_refused_for_a_state_that_shares_memory():
    _, (hk, hv), _ = one_token()
    refused(r"overwrites state's hk, whose elements share memory", state=(hk[:1].expand_as(hk), hv), in_place=True)
    sizes, flat = hk.shape, torch.zeros(2 * hk.numel())
    close = torch.as_strided(flat, sizes, (sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3] - 1, 1))
    refused(r"overwrites state's hk, whose elements share memory", state=(close, hv), in_place=True)
    together = flat[: hk.numel()].view_as(hk)
    for begin in (0, 1, hk.numel() - 1):
        other = torch.as_strided(flat, hv.shape, hv.contiguous().stride(), begin)
        refused("both parts of the state, hk and hv, .* in the same memory", state=(together, other), in_place=True)


def test_in_place_with_states_side_by_side_in_one_tensor():
    token, (hk, hv), _ = one_token()
    both = torch.zeros(*hk.shape[:2], hk.shape[2] + hv.shape[3], hk.shape[3])
    side = both[:, :, : hk.shape[2]].copy_(hk), both[:, :, hk.shape[2] :].transpose(2, 3).copy_(hv)
    o, state = gated_slot_attention_step(*token, state=side, in_place=True)
    expected, wanted = gated_slot_attention_step(*token, state=(hk, hv))
    assert torch.equal(o, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True))


def test_both_parts_of_a_state_are_bfloat16_or_none():
    token, (hk, hv), _ = one_token()
    refused("state's hk must be torch.float32 for torch.float32 inputs, got torch.bfloat16", state=(hk.bfloat16(), hv))
    refused("state's hv must be torch.float32 for torch.float32 inputs, got torch.float16", state=(hk, hv.half()))
    double = [None if x is None else x.double() for x in token]
    refused(
        "state's hk must be torch.float64 for torch.float64 inputs, got torch.bfloat16",
        token=double,
        state=(hk.bfloat16(), hv.bfloat16()),
    )
