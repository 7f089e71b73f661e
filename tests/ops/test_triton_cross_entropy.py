"""The loss's kernel: in Triton's interpreter in float32 and float16, and on a GPU in every format.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and the GPU's.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from flash_gsa.models import loss as losses
from flash_gsa.models.loss import next_token_loss, token_losses

from .interpreter import run_in_interpreter

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import cross_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
gpu = pytest.mark.gpu
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=gpu)]
# bfloat16 fails in the interpreter.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
HALF = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def _device_there(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def table(rows, V, dtype, device, scale=3.0):
    """Logits as the first columns of a wider table with NaN in the others, and targets, every fifth not scored."""
    random = torch.Generator().manual_seed(rows + V)
    wide = torch.full((rows, -(-V // 64) * 64), float("nan"), dtype=dtype, device=device)
    wide[:, :V] = scale * torch.randn(rows, V, generator=random).to(device)
    targets = torch.randint(V, (rows,), generator=random)
    targets[1::5] = -100
    return wide[:, :V], targets.to(device)


def exactly(logits, targets):
    """nll of each row and its gradient in float64, of the logits as they were rounded."""
    z = logits.double().requires_grad_()
    nll = F.cross_entropy(z, targets, reduction="none")
    (dz,) = torch.autograd.grad(nll.sum(), z)
    return nll.detach(), dz


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 17, 320, 8192, 8193, 32000, 32001])
def test_rows(device, dtype, V):
    logits, targets = table(6, V, dtype, device)
    nll, dz = exactly(logits, targets)
    before = logits.clone()
    for gradient in (False, True):
        found = cross_entropy.row_losses(logits, targets, -100, gradient)
        torch.testing.assert_close(found.double(), nll, rtol=2e-6, atol=2e-6)
        assert (found[targets == -100] == 0).all()
        if not gradient:
            assert torch.equal(logits, before)
    # Relative to the larger of p and its difference from 1, of which one is taken from the other.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((logits.double() - dz).abs() <= eps * dz.abs() + 4e-6 * dz.abs() + 4e-7 * (dz < 0) + tiny).all()
    assert (logits[targets == -100] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_keep_their_digits(device):
    logits, targets = table(5, 300, torch.float32, device)
    logits += 1e4
    logits[0, :7], logits[2, 5] = 1.1e4, -1e4
    targets[0], targets[2], targets[3] = 3, 5, int(logits[3].argmax())
    nll, dz = exactly(logits, targets)
    assert nll[2] > 1e4
    found = cross_entropy.row_losses(logits, targets, -100, True)
    torch.testing.assert_close(found.double(), nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), dz, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits_and_such_as_are_no_numbers(device, dtype):
    """-∞ is a probability of 0, a whole tile of it too; NaN and +∞ make the row's loss NaN and no other's."""
    V = 2 * cross_entropy.WIDEST + 5
    logits, targets = table(6, V, dtype, device)
    targets[:] = torch.tensor([V - 1, -100, V - 2, V - 3, V, -1])
    logits[0, : cross_entropy.WIDEST + 3] = float("-inf")
    logits[1, 2] = float("nan")
    logits[2, 4], logits[3, V - 1] = float("nan"), float("inf")
    nll, dz = exactly(logits[:1], targets[:1])
    found = cross_entropy.row_losses(logits, targets, -100, True)
    torch.testing.assert_close(found[:1].double(), nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[:1].double(), dz, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert found[1] == 0
    assert (logits[1] == 0).all()
    # So do targets that are no class: the last two.
    assert found[2:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_scaled_rounds_once(device):
    x = torch.randn(3, 5000, device=device)
    factor = torch.tensor(1 / 3, device=device)
    assert torch.equal(cross_entropy.scaled(x, factor, HALF), (x * factor).to(HALF))
    half = x.to(HALF)
    assert torch.equal(cross_entropy.scaled(half.t(), factor, HALF), (half.t().float() * factor).to(HALF))
    assert torch.equal(cross_entropy.scaled(half, factor, torch.float32), half.float() * factor)


def problem(tokens, V, width, dtype, device):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).to(device, dtype)
    weight = (torch.randn(V, width, generator=random) / 2).to(device, dtype)
    targets = torch.randint(V, (tokens,), generator=random).to(device)
    targets[1::4] = -100
    return hidden, weight, targets


def results(function, inputs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def plain(targets):
    return lambda h, w: F.cross_entropy(losses._widened(F.linear(h, w)), targets, reduction="sum") / 7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "V", "rows"), [(70, 300, 32), (70, 300, 1000), (1, 33, 8), (40, 1, 16), (5, 1000, 1)]
)
def test_loss_is_as_near_to_float64_as_the_plain_one(device, dtype, tokens, V, rows):
    hidden, weight, targets = problem(tokens, V, 16, dtype, device)
    found = results(lambda h, w: next_token_loss(h, w, targets, scored=7, at_once=rows * V), (hidden, weight), dtype)
    usual = results(plain(targets), (hidden, weight), dtype)
    exact = results(plain(targets), (hidden, weight), torch.float64)
    for i, (got, near, want) in enumerate(zip(found, usual, exact, strict=True)):
        assert got.dtype == near.dtype
        error, allowed = (got.double() - want).norm(), (near.double() - want).norm()
        assert error <= 1.5 * allowed + torch.finfo(got.dtype).eps * want.norm() + 1e-6, i
    each = token_losses(hidden, weight, targets, at_once=rows * V)
    torch.testing.assert_close(each.sum() / 7, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_scored_is_zero_with_zero_gradients(device):
    hidden, weight, targets = problem(9, 70, 16, HALF, device)
    for g in results(lambda h, w: next_token_loss(h, w, targets.fill_(-100)), (hidden, weight), HALF):
        assert (g == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_number_is_no_loss(device):
    hidden, weight, targets = problem(9, 70, 16, HALF, device)
    hidden[4] = float("nan")
    assert next_token_loss(hidden, weight, targets, at_once=3 * 70).isnan()


@gpu
@pytest.mark.parametrize("at_once", [None, 256 * 1001])
def test_under_autocast(at_once):
    hidden, weight, targets = problem(700, 1001, 64, torch.float32, "cuda")

    def ours(h, w):
        return next_token_loss(h, w, targets, scored=7, at_once=at_once)

    with torch.autocast("cuda", torch.bfloat16):
        found = results(ours, (hidden, weight), torch.float32)
        usual = results(plain(targets), (hidden, weight), torch.float32)
    exact = results(plain(targets), (hidden, weight), torch.float64)
    assert [x.dtype for x in found] == [torch.float32] * 3
    for got, near, want in zip(found, usual, exact, strict=True):
        assert (got - want).norm() <= 1.5 * (near - want).norm() + 2**-9 * want.norm()


@gpu
def test_memory_is_a_piece_and_the_sums():
    N, V, d = 8192, 8000, 256
    hidden, weight, targets = (
        x.requires_grad_(x.is_floating_point()) for x in problem(N, V, d, torch.bfloat16, "cuda")
    )
    rows, at_once = 512, 512 * V
    next_token_loss(hidden, weight, targets, scored=1, at_once=at_once).backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = next_token_loss(hidden, weight, targets, scored=1, at_once=at_once)
    # 32 MiB more: cuBLAS may take them for itself. All logits would be 125 MiB.
    assert torch.cuda.max_memory_allocated() - before <= 2 * rows * V + 4 * V * d + 2 * N * d + (1 << 25)
    loss.backward()


@gpu
def test_torch_compile_does_not_break_the_graph():
    hidden, weight, targets = problem(300, 1001, 64, torch.bfloat16, "cuda")

    def ours(h, w):
        return next_token_loss(h, w, targets, scored=7, at_once=256 * 1001)

    found = results(torch.compile(ours, fullgraph=True, backend="aot_eager"), (hidden, weight), torch.bfloat16)
    torch.testing.assert_close(found, results(ours, (hidden, weight), torch.bfloat16))


@gpu
def test_in_a_cuda_graph_without_waiting():
    hidden, weight, targets = problem(600, 1001, 64, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def step():
        return torch.autograd.grad(next_token_loss(*leaves, targets, scored=7, at_once=256 * 1001), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.testing.assert_close(found, want)


if not INTERPRETED:

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)
