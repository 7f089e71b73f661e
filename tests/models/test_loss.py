"""The chunked cross entropy is the plain one: same value, same gradients, for any way of cutting it."""

import pytest
import torch
from torch.nn import functional as F

from flash_gsa.models import loss as loss_module
from flash_gsa.models.loss import next_token_loss, token_losses


def problem(tokens=37, vocab=50, width=8, dtype=torch.float64, ignored=5):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[:ignored]] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("at_once", [1, 50, 7 * 50, 36 * 50, 10**9])
@pytest.mark.parametrize("ignored", [0, 5, 36])
def test_equals_plain_cross_entropy(at_once, ignored):
    hidden, weight, targets = problem(ignored=ignored)
    expected = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-100)
    want = torch.autograd.grad(3.0 * expected, (hidden, weight))
    loss = next_token_loss(hidden, weight, targets, at_once=at_once)
    got = torch.autograd.grad(3.0 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradcheck_of_the_chunked_path():
    hidden, weight, targets = problem(tokens=6, vocab=5, width=3, ignored=2)
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, targets, at_once=10), (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen):
    hidden, weight, targets = problem()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    (want,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), free)
    (got,) = torch.autograd.grad(next_token_loss(hidden, weight, targets, at_once=100), free)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_divisor_is_that_of_the_whole_step():
    hidden, weight, targets = problem()
    whole = next_token_loss(hidden, weight, targets)
    scored = int((targets != -100).sum())
    parts = [next_token_loss(hidden[p], weight, targets[p], scored=scored) for p in (slice(0, 5), slice(5, None))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_nothing_scored_is_zero_with_zero_gradients():
    hidden, weight, targets = problem(ignored=37)
    for limit in (1, 10**9):
        loss = next_token_loss(hidden, weight, targets, at_once=limit)
        assert loss.item() == 0.0
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("at_once", [100, 10**9])
def test_bf16_autocast_stays_near_fp32(at_once):
    hidden, weight, targets = problem(dtype=torch.float32)
    exact = next_token_loss(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(hidden, weight, targets, at_once=at_once)
    assert loss.dtype == torch.float32
    # Rounding z to 8 bits moves each nll by at most 2·2⁻⁹·max|z|.
    bound = 2 * 2**-8 * (hidden @ weight.t()).abs().max().item()
    assert 0 < abs(loss.item() - exact.item()) < bound
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    for got, want in zip(grads, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


def test_logits_are_never_all_there():
    """In pieces, no tensor of N·V elements is made: seen by a hook on every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.seen = max(Largest.seen, out.numel())
            return out

    hidden, weight, targets = problem(tokens=64, vocab=320)
    with Largest():
        next_token_loss(hidden, weight, targets, at_once=8 * 320).backward()
    assert Largest.seen == 8 * 320


def test_nothing_is_computed_for_gradients_that_nobody_wants(monkeypatch):
    asked = []
    right = loss_module._row_losses
    monkeypatch.setattr(loss_module, "_row_losses", lambda *x: asked.append(x[-1]) or right(*x))
    hidden, weight, targets = problem()
    with torch.no_grad():
        found = next_token_loss(hidden, weight, targets, at_once=100)
    assert asked
    assert not any(asked)
    assert found == next_token_loss(hidden, weight, targets, at_once=100)
    assert asked[-1]


@pytest.mark.parametrize("at_once", [100, 12 * 50, 10**9])
def test_bf16_is_as_near_to_float64_as_the_plain_table(at_once):
    """Hidden states and weights in bf16: pieces add no errors of their own to the weight's gradient."""
    hidden, weight, targets = (x.detach() for x in problem(tokens=300, dtype=torch.bfloat16))

    def results(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def plain(h, w):
        return F.cross_entropy(loss_module._widened(h @ w.t()), targets)

    found = results(lambda h, w: next_token_loss(h, w, targets, at_once=at_once), torch.bfloat16)
    exact, usual = results(plain, torch.float64), results(plain, torch.bfloat16)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for got, near, want in zip(found, usual, exact, strict=True):
        assert (got - want).norm() <= 1.5 * (near - want).norm() + 2**-9 * want.norm()


@pytest.mark.parametrize("at_once", [100, 10**9])
def test_torch_compile_gives_the_same(at_once):
    hidden, weight, targets = problem()

    def function(h, w):
        return 2.0 * next_token_loss(h, w, targets, scored=7, at_once=at_once)

    want, found = function(hidden, weight), torch.compile(function, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(found, want)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (found, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("kept", "products"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_operator_for_torch_compile(kept, products):
    hidden, weight, targets = problem(dtype=kept)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.flash_gsa.cross_entropy,
            (
                hidden.detach().requires_grad_(needed[0]),
                weight.detach().requires_grad_(needed[1]),
                targets,
                8,
                products,
                *needed,
            ),
        )


def test_pieces_are_whole_tiles_of_a_gpu():
    piece = loss_module._piece
    assert piece(32_000, torch.bfloat16, True, None) == 4096
    assert piece(32_000, torch.float32, True, None) == 2048
    assert piece(10**6, torch.bfloat16, True, None) == 134
    assert piece(10**10, torch.bfloat16, True, None) == 1
    assert piece(512, torch.bfloat16, True, 1 << 14) == 32
    assert piece(32_000, torch.float32, False, None) == 1048


@pytest.mark.parametrize("at_once", [100, 10**9])
def test_token_losses(at_once):
    hidden, weight, targets = problem(tokens=36)
    losses = token_losses(hidden.view(4, 9, -1), weight, targets.view(4, 9), at_once=at_once)
    want = F.cross_entropy(hidden @ weight.t(), targets, reduction="none").view(4, 9)
    assert losses.shape == (4, 9)
    torch.testing.assert_close(losses, want.detach())
    assert (losses[targets.view(4, 9) == -100] == 0).all()
    assert token_losses(hidden[:0], weight, targets[:0]).shape == (0,)
