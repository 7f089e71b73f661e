"""ABC's gates by kernels: in Triton's interpreter, and on a GPU.

The interpreter is chosen when triton is imported: collected without TRITON_INTERPRET=1, this file is one test that
starts it, and the GPU's.
"""

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from flash_gsa import abc_gates
from flash_gsa.ops import gates

from .interpreter import run_in_interpreter

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = torch.finfo(torch.float32).eps
NOTHING = float("-inf")
gpu = pytest.mark.gpu
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=gpu)]
# bfloat16 fails in the interpreter.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
# Boundaries of packed sequences, in eighths of a segment.
PACKED = (0, 0, 1, 1, 10, 11, 27, 34, 34)


@pytest.fixture(autouse=True)
def _device_there(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def span(request, monkeypatch):
    """Tokens of a segment; in the interpreter, which takes its time, fewer than there are on a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        for name, value in (("SHORTEST", 8), ("ROWS", 4), ("BACKWARD_ROWS", 4)):
            monkeypatch.setattr(gates.kernels, name, value)
    return gates.kernels.SHORTEST


@pytest.fixture
def packed(span):
    """Boundaries of packed sequences: empty ones, short ones, one of just two segments, one of a bit more."""
    return [at * span // 8 for at in PACKED]


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Shapes that the kernels were given; the fixture's tests find something there, or nothing where they say so."""
    shapes, kernel = [], gates.kernels.abc_gates
    monkeypatch.setattr(gates.kernels, "abc_gates", lambda x, *rest: shapes.append(x.shape) or kernel(x, *rest))
    return shapes


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def results(logits, initial, bounds, dtype):
    """g, s, the last normalizers, and the gradients of the inputs for fixed random gradients of those."""
    leaves = [logits.detach().to(dtype).requires_grad_()]
    if initial is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves.append(initial.detach().to(wide).requires_grad_())
    outputs = abc_gates(
        leaves[0],
        initial_normalizer=leaves[1] if len(leaves) > 1 else None,
        output_final_normalizer=True,
        cu_seqlens=bounds,
    )
    outgoing = [normal(*y.shape, seed=9 + i, device=y.device) for i, y in enumerate(outputs)]
    # Where nothing is written, the normalizer is -inf whatever the logits are.
    outgoing[2] = outgoing[2].masked_fill(outputs[2] == NOTHING, 0.0)
    gradients = torch.autograd.grad(outputs, leaves, [dy.to(y.dtype) for dy, y in zip(outgoing, outputs, strict=True)])
    return [*(y.detach() for y in outputs), *gradients]


def check(logits, initial, bounds, taken, factor=8):
    """Within a few units of the last place of float64's results; the gradient of 16-bit logits within half a unit."""
    found = results(logits, initial, bounds, logits.dtype)
    assert taken
    exact = results(logits, initial, bounds, torch.float64)
    for i, (got, want) in enumerate(zip(found, exact, strict=True)):
        assert got.dtype == (logits.dtype if i == 3 else torch.float32)
        assert torch.equal(got.isinf(), want.isinf())
        got, want = got.double().nan_to_num(neginf=0), want.nan_to_num(neginf=0)
        half = torch.finfo(logits.dtype).eps / 2 if i == 3 and logits.dtype != torch.float32 else 0.0
        error = (got - want).abs() - half * want.abs()
        assert error.max() <= factor * EPS * want.abs().clamp(min=1).max(), i
        assert error.clamp(min=0).norm() <= factor * EPS * want.norm(), i
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3.4, 2, 5), (1, 0, 1, 1), (2, 0.9, 1, 70)], ids=str)
@pytest.mark.parametrize("continued", [False, True])
def test_of_a_batch(device, dtype, shape, continued, span, taken):
    """Of no full segment (one token), one, and several."""
    B, segments, H, M = shape
    initial = None
    if continued:
        initial = normal(B, H, M, seed=1, device=device)
        initial[0, 0, 0] = NOTHING
    check(normal(B, 1 + int(segments * span), H, M, dtype=dtype, device=device), initial, None, taken)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bounds_on", "continued"), [("cpu", False), ("device", True)])
def test_packed(device, bounds_on, continued, packed, taken):
    logits = normal(1, packed[-1], 2, 5, device=device)
    bounds = torch.tensor(packed, dtype=torch.int32, device=device if bounds_on == "device" else "cpu")
    initial = None
    if continued:
        initial = normal(len(packed) - 1, 2, 5, seed=1, device=device)
        initial[0], initial[1, 0], initial[4] = NOTHING, NOTHING, NOTHING
    g, s, z, dl, *_ = check(logits, initial, bounds, taken)
    for n, (start, end) in enumerate(pairwise(packed)):
        own = None if initial is None else initial[n : n + 1]
        if start == end:
            assert torch.equal(z[n], torch.full_like(z[n], NOTHING) if initial is None else initial[n])
            continue
        alone = abc_gates(logits[:, start:end], initial_normalizer=own, output_final_normalizer=True)
        torch.testing.assert_close(alone, (g[:, start:end], s[:, start:end], z[n : n + 1]), rtol=1e-5, atol=1e-6)
    assert dl.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_are_the_running_mean(device, span, taken):
    T = 3 * span + 1
    g, s = abc_gates(torch.full((1, T, 1, 1), -3e4, device=device))
    assert taken
    n = torch.arange(1.0, T + 1, device=device)
    torch.testing.assert_close(s.flatten(), 1 / n, rtol=16 * EPS, atol=0)
    torch.testing.assert_close(g.flatten()[1:], torch.log1p(-1 / n[1:]), rtol=16 * EPS, atol=0)
    assert g.flatten()[0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segments", [0.2, 1, 2.4])
def test_logits_of_minus_infinity_write_nothing(device, segments, span, taken):
    nothing, T = 1 + int(segments * span), 4 * span
    logits = torch.zeros(1, T, 1, 2, device=device)
    logits[:, :nothing, :, 0] = NOTHING
    logits[:, nothing + 2, :, 1] = NOTHING  # between others
    g, s, z = abc_gates(logits, output_final_normalizer=True)
    assert taken
    n = (torch.arange(T, device=device) - nothing + 1).clamp(min=1).float()
    torch.testing.assert_close(s[0, :, 0, 0], 1 / n, rtol=16 * EPS, atol=0)
    assert (g[0, : nothing + 1, 0, 0] == 0).all()
    torch.testing.assert_close(g[0, nothing + 1 :, 0, 0], torch.log1p(-1 / n[nothing + 1 :]), rtol=16 * EPS, atol=0)
    assert (g[0, nothing + 2, 0, 1], s[0, nothing + 2, 0, 1]) == (0, 0)
    torch.testing.assert_close(z[0, 0].exp(), torch.tensor([T - nothing, T - 1.0], device=device), rtol=1e-5, atol=0)
    _, _, none = abc_gates(torch.full((1, T, 1, 1), NOTHING, device=device), output_final_normalizer=True)
    assert none.item() == NOTHING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at", [0, 3, 1.5, 3.9])
def test_nan_is_not_taken_for_nothing(device, at, span, taken):
    """Gates that are finite in its place would hide from a training run what became of its model."""
    T, t = 4 * span, int(at * span) if isinstance(at, float) else at
    logits = normal(1, T, 1, 2, device=device)
    clean = abc_gates(logits)
    logits[:, t, :, 0] = float("nan")
    logits.requires_grad_()
    g, s, z = abc_gates(logits, output_final_normalizer=True)
    assert taken
    assert g[0, t + 1 :, 0, 0].isnan().all()
    assert s[0, t + 1 :, 0, 0].isnan().all()
    assert z[0, 0, 0].isnan()
    assert torch.equal(g[..., 1], clean[0][..., 1])
    assert torch.equal(s[0, :t], clean[1][0, :t])
    (dl,) = torch.autograd.grad(g.sum() + s.sum(), logits)
    assert dl[..., 0].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rising", "falling", "jumps", "spike", "padding"])
def test_huge_logits_cost_no_digits(device, kind, span, taken):
    """Unlike a normalizer near 10⁴, which as one float32 is good to half a thousandth."""
    T = 3 * span + 1
    t = torch.linspace(-1, 1, T)[None, :, None, None].expand(2, T, 1, 3)
    logits = (
        normal(2, T, 1, 3)
        + {
            "rising": 1e4 * t,
            "falling": -1e4 * t,
            "jumps": 1e4 * normal(*t.shape, seed=1).sign(),
            "spike": 1e4 * ((t > 0.9).float() - (t < -0.9).float()),
            "padding": torch.where(t < -0.3, -1e30, 0.0),
        }[kind]
    )
    leaf = logits.to(device).requires_grad_()
    g, s = abc_gates(leaf)
    assert taken
    want_g, want_s = by_definition(logits)
    # An exponent is rounded to its size in units of the result; e^-87 is the last of float32's normal numbers.
    allowed = 16 * EPS * want_s * (1 - want_s.clamp(min=1e-40).log()) + torch.finfo(torch.float32).tiny
    assert ((s.detach().cpu().double() - want_s).abs() <= allowed).all()
    assert ((g.detach().cpu().double() - want_g).abs() <= allowed + 16 * EPS * want_g.abs()).all()
    (g.clamp(min=-1e4).sum() + s.square().sum()).backward()
    assert leaf.grad.isfinite().all()


def by_definition(logits):
    """g and s in float64, by sums over all earlier tokens of differences of logits."""
    logits = logits.double()
    g, s = torch.zeros_like(logits), torch.ones_like(logits)
    for t in range(1, logits.shape[1]):
        largest = logits[:, :t].amax(1)
        margin = (logits[:, t] - largest) - (logits[:, :t] - largest[:, None]).exp().sum(1).log()
        g[:, t], s[:, t] = F.logsigmoid(-margin), torch.sigmoid(margin)
    return g, s


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bounds", [(0, 1, 3), (0, 8, 9, 9, 25)])
def test_pieces_carried_through_the_normalizer_are_one_pass(device, bounds, span, taken):
    bounds = [at * span // 8 for at in bounds]
    logits = normal(2, bounds[-1], 1, 5, device=device)
    whole = abc_gates(logits, output_final_normalizer=True)
    found, carried = [], None
    for start, end in pairwise(bounds):
        *piece, carried = abc_gates(logits[:, start:end], initial_normalizer=carried, output_final_normalizer=True)
        found.append(piece)
    assert len(taken) == 1 + len(set(bounds)) - 1
    for i in range(2):
        torch.testing.assert_close(torch.cat([piece[i] for piece in found], 1), whole[i], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(carried, whole[2])


@pytest.mark.parametrize("device", DEVICES)
def test_what_comes_later_changes_no_bit(device, span, taken):
    logits = normal(2, 3 * span, 1, 5, device=device)
    before = abc_gates(logits)
    for later in (span, 2 * span - 3, 3 * span - 1):
        other = logits.clone()
        other[:, later:] = 1e4 * normal(2, 3 * span - later, 1, 5, seed=1, device=device)
        for a, b in zip(before, abc_gates(other), strict=True):
            assert torch.equal(a[:, :later], b[:, :later])
    assert len(taken) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_normalizer_of_nothing_is_a_new_sequence(device, span, taken):
    logits = normal(2, 2 * span, 1, 5, device=device)
    nothing = torch.full((2, 1, 5), NOTHING, requires_grad=True, device=device)
    leaf = logits.clone().requires_grad_()
    g, s, z = abc_gates(leaf, initial_normalizer=nothing, output_final_normalizer=True)
    for got, want in zip((g, s, z), abc_gates(logits, output_final_normalizer=True), strict=True):
        assert torch.equal(got, want)
    (g.sum() + s.square().sum() + z.sum()).backward()
    assert len(taken) == 2
    assert leaf.grad.isfinite().all()
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))


@pytest.mark.parametrize("device", DEVICES)
def test_twice_is_the_same_whatever_memory_held(device, packed, taken):
    bounds = torch.tensor(packed, dtype=torch.int32, device=device)
    logits, initial = normal(1, packed[-1], 2, 5, device=device), normal(8, 2, 5, seed=1, device=device)
    first = results(logits, initial, bounds, torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new tensors with NaN
    try:
        again = results(logits, initial, bounds, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(taken) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bounds", [None, (0, 0, 20)])
def test_views_of_larger_tensors(device, bounds, taken):
    wide = normal(1, 20, 3, 8, device=device)
    bounds = None if bounds is None else torch.tensor(bounds, device=device)
    check(wide[:, :, 1:, :5], None, bounds, taken)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_float64_need_no_kernel(device, taken):
    for shape, bounds in (((2, 0, 1, 3), None), ((1, 0, 1, 3), torch.tensor([0, 0, 0], device=device))):
        g, s, z = abc_gates(torch.zeros(shape, device=device), output_final_normalizer=True, cu_seqlens=bounds)
        assert g.shape == s.shape == shape
        assert (z == NOTHING).all()
        assert z.shape == (2, 1, 3)
    assert abc_gates(normal(2, 8, 1, 3, device=device).double())[0].dtype == torch.float64
    assert not taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bounds", [None, (0, 0, 9, 17)])
def test_compiles_without_a_break(device, bounds):
    logits, initial = normal(1, 17, 2, 5, device=device), normal(3 if bounds else 1, 2, 5, device=device)
    bounds = torch.tensor(bounds, dtype=torch.int32, device=device) if bounds else None

    def everything(logits, initial, bounds):
        return abc_gates(logits, initial_normalizer=initial, output_final_normalizer=True, cu_seqlens=bounds)

    def with_gradients(function):
        leaves = [x.clone().requires_grad_() for x in (logits, initial)]
        outputs = function(*leaves, bounds)
        loss = outputs[0].square().sum() + outputs[1].sum() + outputs[2].square().sum()
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    compiled = with_gradients(torch.compile(everything, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled, with_gradients(everything), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bounds", [None, (0, 7, 10)])
def test_the_operator_under_torch_compile_is_well_formed(device, bounds):
    logits, initial = normal(1, 10, 1, 3, device=device), normal(2 if bounds else 1, 1, 3, device=device)
    bounds = torch.tensor(bounds, dtype=torch.int32, device=device) if bounds else None
    torch.library.opcheck(gates.kernels.abc_op, (logits.requires_grad_(), initial.requires_grad_(), bounds))


@gpu
@pytest.mark.parametrize(
    "shape", [(8, 2048, 4, 64), (1, 65_536, 4, 64), (1, 200_000, 1, 16), (64, 300, 8, 33)], ids=str
)
def test_long_and_wide(shape, taken):
    """Sums over many tokens: their errors add up as steps of a random walk do."""
    check(normal(*shape, device="cuda"), None, None, taken, factor=max(64, shape[1] ** 0.5))


@gpu
def test_many_packed_sequences(taken):
    lengths = torch.randint(0, 400, (300,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().cuda()
    check(
        normal(1, int(bounds[-1]), 4, 64, device="cuda"), normal(300, 4, 64, seed=1, device="cuda"), bounds, taken, 32
    )


@gpu
def test_the_host_waits_for_nothing(packed, taken):
    logits = normal(1, packed[-1], 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    bounds = torch.tensor(packed, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        g, s = abc_gates(logits, cu_seqlens=bounds)
        (g.sum() + s.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken


@gpu
def test_offsets_beyond_32_bits(taken, gpu_room):
    """The last tokens of 2³¹ and more numbers are those of the same sequence alone."""
    gpu_room(32)
    B, T, H, M = 9, 65_536, 16, 256
    logits = torch.zeros(B, T, H, M, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(T, H, M, device="cuda")
    with torch.no_grad():
        g, s = abc_gates(logits)
        alone = abc_gates(logits[-1:])
    assert len(taken) == 2
    torch.testing.assert_close(g[-1:], alone[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(s[-1:], alone[1], rtol=1e-4, atol=1e-7)


if not INTERPRETED:

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)
