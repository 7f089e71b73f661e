"""The kernels around the operator: in Triton's interpreter in float32 and float16, and on a GPU in every format.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and the GPU's.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import GatedSlotAttention, gated_slot_attention
from flash_gsa.layers import sequences
from flash_gsa.ops import gates, pointwise
from flash_gsa.ops.pointwise import WIDEST_ROW, add_norm, log_gates, silu_each, silu_norm, swiglu

from .interpreter import run_in_interpreter

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
gpu = pytest.mark.gpu
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=gpu)]
# bfloat16 fails in the interpreter.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _device_there(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def fused(monkeypatch):
    """Counts what the kernels are given; a test that needs them must find that it got them."""
    calls = []
    right = pointwise.uses_kernels
    monkeypatch.setattr(pointwise, "uses_kernels", lambda *x: right(*x) and (calls.append(x) or True))
    return calls


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Normal numbers, every seventh large."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.flatten()[::7] *= 12
    return x.to(device, dtype)


def results(function, inputs, outgoing, dtype):
    """What function returns and its inputs' gradients, in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, [dy.to(y.dtype) for y, dy in zip(outputs, outgoing, strict=True)])
    return [*(y.detach() for y in outputs), *gradients]


def check(function, inputs, outgoing, fused, monkeypatch):
    """As near to float64 as its equation in PyTorch is, element by element and as a whole."""
    found = results(function, inputs, outgoing, inputs[0].dtype)
    assert fused
    monkeypatch.setattr(pointwise, "uses_kernels", lambda *x: False)
    usual = results(function, inputs, outgoing, inputs[0].dtype)
    exact = results(function, inputs, outgoing, torch.float64)
    for i, (got, plain, want) in enumerate(zip(found, usual, exact, strict=True)):
        assert got.dtype == plain.dtype
        assert got.shape == plain.shape
        eps = torch.finfo(got.dtype).eps
        error, allowed = (got.double() - want).abs(), (plain.double() - want).abs()
        assert error.norm() <= 2 * allowed.norm() + eps * want.norm(), i
        assert error.max() <= 2 * allowed.max() + 2 * eps * want.abs().max(), i


def three(dtype, device):
    """q, k, v of different sizes, one spread over memory, and gradients for them."""
    shapes = (2, 300, 5), (2, 300, 7), (7, 11)
    made = [
        [normal(*shape, seed=10 * s + i, dtype=dtype, device=device) for i, shape in enumerate(shapes)] for s in (0, 1)
    ]
    made[0][2], made[1][0] = made[0][2].T, made[1][0].transpose(0, 1).contiguous().transpose(0, 1)
    made[1][2] = made[1][2].T
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_three(device, dtype, fused, monkeypatch):
    check(silu_each, *three(dtype, device), fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1.0, 8.0])
def test_gates(device, dtype, tau, fused, monkeypatch):
    f = normal(3, 700, dtype=dtype, device=device)
    dg = normal(3, 700, seed=1, device=device)
    check(
        lambda x: log_gates(x, tau) if x.dtype != torch.float64 else F.logsigmoid(x) / tau,
        [f],
        [dg],
        fused,
        monkeypatch,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_gates_of_strong_logits_keep_their_digits(device, fused):
    f = torch.cat([torch.linspace(-100, 85, 1500), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4, -3e38, 3e38])]).to(device)
    want = F.logsigmoid(f.double())
    got = log_gates(f, 1.0)
    assert fused
    # The exponent of e^-|f| is rounded to |f| half units of the result; the rest is a division and a few products.
    allowed = torch.finfo(torch.float32).eps * (8 + f.double().abs().clamp(max=100)) * want.abs()
    assert ((got.double() - want).abs() <= allowed + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1), (40, 33), (2, 4096), (3, 2560)], ids=str)
def test_norm(device, dtype, with_weight, shape, fused, monkeypatch):
    x, dy = (normal(*shape, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    inputs = [x, 1 + 0.3 * torch.randn(shape[-1], dtype=dtype, device=device)] if with_weight else [x]
    check(lambda x, w=None: silu_norm(x, w, 1e-5), inputs, [dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1), (40, 33), (3, 2560)], ids=str)
def test_sum_and_norm(device, dtype, with_weight, with_branch, shape, fused, monkeypatch):
    x, branch, dh, dy = (normal(*shape, seed=seed, dtype=dtype, device=device) for seed in range(4))
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # spread over memory
    inputs = [x] + [branch] * with_branch
    if with_weight:
        inputs.append(1 + 0.3 * torch.randn(shape[-1], dtype=dtype, device=device))

    def function(x, *others):
        others = [*others] if with_branch else [None, *others]
        return add_norm(x, *others, *[None] * (not with_weight), 1e-5)

    check(function, inputs, [dh, dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_result_of_sum_and_norm_is_enough(device, wanted, fused, monkeypatch):
    inputs = [normal(6, 40, seed=seed, device=device) for seed in (0, 1)] + [torch.rand(40, device=device)]
    dy = normal(6, 40, seed=2, device=device)

    def function(x, branch, weight):
        return add_norm(x, branch, weight, 1e-5)[wanted] + 0 * weight

    check(function, inputs, [dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
def test_a_branch_may_have_fewer_digits_than_the_residual_stream(device, fused):
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    x, branch = normal(4, 48, device=device).requires_grad_(), normal(4, 48, seed=1, dtype=dtype, device=device)
    branch.requires_grad_()
    h, y = add_norm(x, branch, None, 1e-6)
    assert fused
    assert (h.dtype, y.dtype) == (torch.float32, torch.float32)
    assert torch.equal(h, x + branch)
    (h + y).sum().backward()
    assert torch.equal(branch.grad, x.grad.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_weight", [True, False])
def test_under_autocast_the_norm_is_what_a_product_would_read(device, with_weight, fused):
    """The same numbers, and the same gradients, as if a product cast it: in fewer passes over memory."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    x, branch = normal(4, 48, device=device), normal(4, 48, seed=1, dtype=dtype, device=device)
    weight = torch.rand(48, device=device) if with_weight else None
    dh, dy = normal(4, 48, seed=2, device=device), normal(4, 48, seed=3, dtype=dtype, device=device)

    def run(autocast):
        leaves = [z.detach().clone().requires_grad_() for z in (x, branch, weight) if z is not None]
        with torch.autocast(device, dtype, enabled=autocast):
            h, y = add_norm(leaves[0], leaves[1], leaves[2] if with_weight else None, 1e-6)
        assert h.dtype == torch.float32
        assert y.dtype == (dtype if autocast else torch.float32)
        return h, y.to(dtype), *torch.autograd.grad((h, y), leaves, (dh, dy.to(y.dtype)))

    found, usual = run(True), run(False)
    assert len(fused) == 2
    assert all(map(torch.equal, found, usual))
    with pointwise.separate():
        for got, want in zip(found, run(True), strict=True):
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_is_that_of_the_sum_as_it_is_kept(device, fused):
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    x, branch = (normal(9, 64, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    h, y = add_norm(x, branch, None, 1e-6)
    again, z = add_norm(h, None, None, 1e-6)
    assert len(fused) == 2
    assert torch.equal(h, x + branch)
    assert again is h
    assert torch.equal(y, z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(device, dtype, fused, monkeypatch):
    gate, up, dy = (normal(300, 3, 7, seed=seed, dtype=dtype, device=device) for seed in range(3))
    check(swiglu, [gate, up.transpose(0, 1).contiguous().transpose(0, 1)], [dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_s_weight_may_have_more_digits_than_its_input(device, fused):
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    x, weight = normal(4, 48, dtype=dtype, device=device), torch.rand(48, device=device, requires_grad=True)
    y = silu_norm(x, weight, 1e-6)
    y.sum().backward()
    assert fused
    assert (y.dtype, weight.grad.dtype) == (dtype, torch.float32)
    a = F.silu(x.double())
    a = a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(weight.grad.double(), a.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), a * weight, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_zeros_and_of_huge_numbers(device, fused):
    x = torch.zeros(3, 40, device=device)
    x[1] = -1e4
    x[2] = 1e15
    x.requires_grad_()
    y = silu_norm(x, None, 1e-6)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert fused
    assert (y[:2] == 0).all()
    torch.testing.assert_close(y[2], torch.ones_like(y[2]))
    # Near 0, SiLU is x/2, and the norm divides by √ε.
    torch.testing.assert_close(dx[0], torch.full_like(dx[0], 0.5 / 1e-3))
    assert dx.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("D", [48, 1025])
@pytest.mark.parametrize("activation", [F.silu, None], ids=["SiLU", "sum"])
def test_gradient_of_a_norm_s_weight_is_the_same_twice(device, D, activation, fused, monkeypatch):
    """More rows than programs share; what uninitialised memory holds has no part in it."""
    rows = 16_384
    if INTERPRETED:
        monkeypatch.setattr(pointwise.kernels, "SHARES", 3)
        rows = 500 if D < 1025 else 20
    x = normal(rows, D, device=device)
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills new tensors with NaN
    try:
        for _ in range(2):
            weight = torch.full((D,), 2.0, device=device, requires_grad=True)
            y = silu_norm(x, weight, 1e-6) if activation else add_norm(x, None, weight, 1e-6)[1]
            found.append(torch.autograd.grad((y * x).sum(), weight)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert fused
    assert torch.equal(*found)
    a = F.silu(x.double()) if activation else x.double()
    want = (a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * x).sum(0)
    torch.testing.assert_close(found[0].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_nothing_is_kept(device, fused):
    x, weight = normal(4, 48, device=device), torch.ones(48, device=device, requires_grad=True)
    with torch.no_grad():
        outputs = [*silu_each(x, x, x), log_gates(x, 8.0), silu_norm(x, weight, 1e-6)]
        outputs += [*add_norm(x, x, weight, 1e-6), swiglu(x, x)]
    assert len(fused) == 5
    assert not any(y.requires_grad for y in outputs)
    assert all(y.grad_fn is not None for y in (silu_norm(x, weight, 1e-6), *silu_each(x, weight, x)))


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_kernel_takes_is_computed_all_the_same(device, fused):
    wide, empty = normal(2, WIDEST_ROW + 1, device=device), torch.empty(0, 8, device=device)
    double = normal(2, 8, device=device).double()
    for x in (wide, empty, double):
        y = silu_norm(x, None, 1e-6)
        torch.testing.assert_close(y, F.rms_norm(F.silu(x), x.shape[-1:], None, 1e-6))
        h, y = add_norm(x, x, None, 1e-6)
        torch.testing.assert_close((h, y), (2 * x, F.rms_norm(2 * x, x.shape[-1:], None, 1e-6)))
    for x in (empty, double):
        assert silu_each(x, x, x)[2].dtype == x.dtype
        assert torch.equal(swiglu(x, x), F.silu(x) * x)
        assert log_gates(x, 2.0).dtype == torch.float32
    assert not fused


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_sees_the_equations(device, fused):
    def all_of_them(x, weight):
        norms = silu_norm(x, weight, 1e-6), *add_norm(x, x, weight, 1e-6)
        return *silu_each(x, x, x), log_gates(x, 8.0), *norms, swiglu(x, x)

    x, weight = normal(4, 48, device=device), torch.rand(48, device=device)
    found = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(x, weight)
    assert not fused
    torch.testing.assert_close(found, all_of_them(x, weight))
    assert fused


LAYERS = [
    {},
    {"elementwise_affine": False, "num_kv_heads": 2},
    {"use_norm": False, "use_short_conv": True},
    {"value_activation": "identity"},
    {"output_activation": "identity"},
    {"feature_map": "relu"},
    {"gating": "data_independent"},
    {"gate_source": "pooled_keys", "masked": True},
    {"gating": "abc", "masked": True},
]


def in_torch(*inputs, **options):
    return gated_slot_attention(*inputs, **options, backend="chunk")


def layer_results(mixer, x, mask):
    x = x.detach().requires_grad_()
    y = mixer(x, attention_mask=mask)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]


def layer(options, T, device):
    torch.manual_seed(0)
    options = dict(options)
    masked = options.pop("masked", False)
    mixer = GatedSlotAttention(32, **{"num_heads": 4, "num_slots": 6, **options}).to(device)
    with torch.no_grad():  # gates and activations far from where they are linear
        for parameter in mixer.parameters():
            parameter.mul_(3)
    mask = torch.ones(2, T, device=device) if masked else None
    if masked:
        mask[1, :7] = 0
    return mixer, torch.randn(2, T, 32).to(device), mask


def compare_layer(mixer, x, mask, fused, monkeypatch, rtol):
    found = layer_results(mixer, x, mask)
    assert fused
    monkeypatch.setattr(pointwise, "uses_kernels", lambda *x: False)
    monkeypatch.setattr(gates, "runs_on", lambda x: False)
    for got, want in zip(found, layer_results(mixer, x, mask), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= rtol * want.norm()


if INTERPRETED:

    @pytest.mark.parametrize("options", LAYERS, ids=str)
    def test_layer_with_and_without_kernels(options, fused, monkeypatch):
        # The operator itself is no subject here, and slow in the interpreter.
        monkeypatch.setattr(sequences, "gated_slot_attention", in_torch)
        compare_layer(*layer(options, 20, "cpu"), fused, monkeypatch, rtol=2e-5)

else:

    @gpu
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
    @pytest.mark.parametrize("options", LAYERS, ids=str)
    def test_layer_on_a_gpu(options, precision, fused, monkeypatch):
        mixer, x, mask = layer(options, 200, "cuda")
        if precision == "bfloat16":
            mixer, x = mixer.bfloat16(), x.bfloat16()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            compare_layer(mixer, x, mask, fused, monkeypatch, rtol=1e-4 if precision == "float32" else 0.05)

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)
