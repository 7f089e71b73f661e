"""Linear maps that keep and move less: in Triton's interpreter in float32 and float16, and on a GPU in every format.

Collected without TRITON_INTERPRET=1, this file is one test that starts the interpreter, and the GPU's.
"""

import pytest
import torch
import torch.nn.functional as F

from flash_gsa.ops import linears, pointwise
from flash_gsa.ops.linears import shared_linears, silu_norm_linear, swiglu_mlp

from .interpreter import run_in_interpreter
from .test_triton_pointwise import DEVICES, DTYPES, INTERPRETED, check, fused, normal  # noqa: F401

HALF = torch.float16 if INTERPRETED else torch.bfloat16


@pytest.fixture(autouse=True)
def _device_there(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def weights(*shapes, **options):
    """Normal numbers that keep the size of what they multiply."""
    made = [torch.randn(*shape, generator=torch.Generator().manual_seed(70 + i)) for i, shape in enumerate(shapes)]
    return [(w / w.shape[-1] ** 0.5).to(**options) for w in made]


def kept(function):
    """Bytes of all storages that autograd keeps for the backward of what function returns."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function()
    assert outputs is not None
    return sum(found.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_one_input(device, dtype, fused, monkeypatch):  # noqa: F811
    x = normal(40, 3, 33, dtype=dtype, device=device).transpose(0, 1)
    maps = weights((33, 33), (33, 33), (7, 33), dtype=dtype, device=device)
    outgoing = [normal(3, 40, w.shape[0], seed=i, dtype=dtype, device=device) for i, w in enumerate(maps)]
    check(shared_linears, [x, *maps], outgoing, fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 33), (1, 77), (300, 9)], ids=str)
def test_mlp(device, dtype, shape, fused, monkeypatch):  # noqa: F811
    x = normal(*shape, dtype=dtype, device=device).transpose(0, 1).contiguous().transpose(0, 1)
    maps = weights((41, shape[-1]), (41, shape[-1]), (17, 41), dtype=dtype, device=device)
    dy = normal(*shape[:-1], 17, seed=2, dtype=dtype, device=device)
    check(swiglu_mlp, [x, *maps], [dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_that_is_kept_gives_the_same_twice(device, fused):  # noqa: F811
    x = normal(6, 32, device=device).requires_grad_()
    maps = [w.requires_grad_() for w in weights((48, 32), (48, 32), (32, 48), device=device)]
    y = swiglu_mlp(x, *maps).sum()
    found = [torch.autograd.grad(y, [x, *maps], retain_graph=keep) for keep in (True, True, False)]
    assert fused
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 33), (40, 2048)], ids=str)
def test_norm_and_map(device, dtype, with_weight, shape, fused, monkeypatch):  # noqa: F811
    x = normal(*shape, dtype=dtype, device=device).transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [x, *weights((17, shape[-1]), dtype=dtype, device=device)]
    if with_weight:
        inputs.append(1 + 0.3 * torch.randn(shape[-1], dtype=dtype, device=device))
    dy = normal(*shape[:-1], 17, seed=2, dtype=dtype, device=device)
    check(lambda x, w, n=None: silu_norm_linear(x, n, 1e-5, w), inputs, [dy], fused, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", range(4))
def test_only_what_is_wanted_gets_a_gradient(device, wanted, fused):  # noqa: F811
    inputs = [normal(5, 32, device=device), *weights((32, 32), (32, 32), (32, 32), device=device)]
    inputs[wanted].requires_grad_()

    def run():
        x, first, second, third = inputs
        y, _ = shared_linears(x, first, second)
        y = swiglu_mlp(x + y, first, second, third) + silu_norm_linear(y, third[0], 1e-5, second)
        return torch.autograd.grad(y.sum(), inputs[wanted])[0]

    found = run()
    assert len(fused) == 3
    with pointwise.separate():
        torch.testing.assert_close(found, run(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_rounds_inputs_of_products_and_no_gradient_of_weights(device, fused):  # noqa: F811
    x = normal(6, 32, device=device).requires_grad_()
    maps = [w.requires_grad_() for w in weights((32, 32), (32, 32), (48, 32), (48, 32), (32, 48), device=device)]
    norm = torch.ones(32, device=device, requires_grad=True)

    def run():
        with torch.autocast(device, HALF):
            y, z = shared_linears(x + 0, *maps[:2])  # autocast itself keeps one cast of a leaf
            return swiglu_mlp(z, *maps[2:]) + silu_norm_linear(y, norm, 1e-5, maps[0])

    found = run()
    assert len(fused) == 3
    assert found.dtype == HALF
    gradients = torch.autograd.grad(found.sum(), [x, norm, *maps])
    with pointwise.separate():
        wanted = torch.autograd.grad(run().sum(), [x, norm, *maps])
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 8 * torch.finfo(HALF).eps * want.norm()


@pytest.mark.gpu
def test_a_float32_weights_gradient_is_not_rounded_to_bfloat16(fused):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = normal(300, 64, dtype=torch.bfloat16, device="cuda")
    maps = [w.requires_grad_() for w in weights((64, 64), (96, 64), (96, 64), (64, 96), device="cuda")]
    norm = torch.ones(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        (y,) = shared_linears(x, maps[0])
        z = swiglu_mlp(x, *maps[1:]) + silu_norm_linear(x, norm, 1e-5, maps[0])
    assert len(fused) == 3
    for gradient in torch.autograd.grad((y, z), maps, (y.detach(), z.detach())):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("device", DEVICES)
def test_kept_is_what_is_said_to_be(device, fused):  # noqa: F811
    x = normal(6, 32, device=device).requires_grad_()
    maps = [w.requires_grad_() for w in weights((48, 32), (48, 32), (32, 48), dtype=HALF, device=device)]
    weight_bytes, row, wide = 2 * sum(w.numel() for w in maps), 2 * 6 * 32, 2 * 6 * 48

    def mlp():
        with torch.autocast(device, HALF):
            return swiglu_mlp(x + 0, *maps)

    def norm():
        return silu_norm_linear(x.to(HALF), None, 1e-5, maps[0])

    assert kept(mlp) == weight_bytes + row + 2 * wide  # x in half precision, gate and up
    assert kept(norm) == 2 * maps[0].numel() + row + 4 * 6  # x, and a number a row
    h = x + 0
    assert kept(lambda: pointwise.add_norm(h, h, None, 1e-5)) == 4 * h.numel() + 4 * 6  # the sum, and a number a row
    assert len(fused) == 3
    with pointwise.separate():
        assert kept(mlp) == weight_bytes + 2 * row + 4 * wide


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_and_doubles_are_computed_all_the_same(device, fused):  # noqa: F811
    for x in (torch.empty(0, 8, device=device), normal(3, 8, device=device).double()):
        (weight,) = weights((8, 8), device=device, dtype=x.dtype)
        (z,) = shared_linears(x, weight)
        torch.testing.assert_close(z, x @ weight.t())
        torch.testing.assert_close(swiglu_mlp(x, weight, weight, weight), (F.silu(z) * z) @ weight.t())
        want = F.rms_norm(F.silu(x), (8,), None, 1e-5) @ weight.t()
        torch.testing.assert_close(silu_norm_linear(x, None, 1e-5, weight), want)
    assert not fused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_with_one_operator_under_torch_compile(device, autocast, monkeypatch):
    x = normal(4, 33, device=device).requires_grad_()
    maps = [w.requires_grad_() for w in weights((48, 33), (48, 33), (17, 48), device=device)]
    calls = []
    right = pointwise.kernels.swiglu_product
    monkeypatch.setattr(pointwise.kernels, "swiglu_product", lambda *x: calls.append(x) or right(*x))
    found = []
    torch._dynamo.reset()
    for function in (swiglu_mlp, torch.compile(swiglu_mlp, fullgraph=True, backend="aot_eager")):
        with torch.autocast(device, HALF, enabled=autocast):
            y = function(x, *maps)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *maps])])
    assert len(calls) == 2
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        eps = torch.finfo(HALF if autocast else torch.float32).eps
        assert (got - want).norm() <= 8 * eps * want.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wants_weight", [True, False])
def test_operators_are_what_they_say(device, wants_weight):
    gate, up = (normal(4, 33, seed=i, device=device) for i in (0, 1))
    dy = normal(4, 17, device=device)
    (weight,) = weights((17, 33), device=device)
    torch.library.opcheck(linears.swiglu_linear_backward_op, (dy, gate, up, weight, wants_weight))
    inputs = gate.requires_grad_(), up.requires_grad_(), weight.requires_grad_(wants_weight)
    torch.library.opcheck(linears.swiglu_linear_op, inputs)


if not INTERPRETED:

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)
