"""Every token mixer as a whole on a GPU, trained and decoded: as near to float64 as plain PyTorch in its precision.

Truth and plain are the same layer on the CPU, its operator unrolled over pairs of tokens: see `tests/ops/judge.py`.
They have no fused kernel, no chunk and no state.
"""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from flash_gsa import HGRN2, GatedLinearAttention, GatedSlotAttention, MultiScaleRetention, SoftmaxAttention
from flash_gsa.layers.sequences import WholeSequences

from ..ops import judge
from ..ops.helpers import Case, Tensors

pytestmark = pytest.mark.gpu

D, T = 256, 150
LENGTHS = (0, 100, 3, 0, 47)
UNITS = 16  # of float32 in the last place: several operations' sums, and not one operator's
HEADS = {"num_heads": 4, "num_kv_heads": 2}  # 64 wide
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "gsa": lambda: GatedSlotAttention(D, num_slots=32, **HEADS),
    "abc": lambda: GatedSlotAttention(D, num_slots=32, gating="abc", **HEADS),
    "gla": lambda: GatedLinearAttention(D, expand_k=1.0, **HEADS),
    "hgrn2": lambda: HGRN2(D, **HEADS),
    "retnet": lambda: MultiScaleRetention(D, expand_v=1.0, **HEADS),
    "attention": lambda: SoftmaxAttention(D, **HEADS),
    "window": lambda: SoftmaxAttention(D, window_size=20, **HEADS),
}

every_mixer = pytest.mark.parametrize("name", MIXERS)
both_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


class Unrolled(WholeSequences):
    """Operators of whole sequences as sums over pairs of tokens."""

    def gated_slot_attention(self, q, k, v, g, s, *, initial_state, output_final_state, cu_seqlens, states):
        assert initial_state is None
        x = {"q": q, "k": k, "v": v, "g": g} | ({} if s is None else {"s": s})
        o, _, _ = judge.unrolled(x, case_of(q, k, 1.0, cu_seqlens), q.dtype)
        return o, None

    def gated_linear_attention(self, q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):
        assert initial_state is None
        x = {"q": q, "k": k, "v": v, "g": g.expand_as(k)}
        return judge.unrolled_linear(x, case_of(q, k, scale, cu_seqlens), q.dtype)[0], None


def case_of(q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None) -> Case:
    lengths = None if cu_seqlens is None else tuple(cu_seqlens.diff().tolist())
    return Case(T=q.shape[1], B=q.shape[0], HQ=q.shape[2], H=k.shape[2], scale=scale, lengths=lengths)


def mixer_of(name: str, dtype: torch.dtype, device: str, weights: torch.dtype, unrolled: bool = False) -> nn.Module:
    """The mixer in `dtype` on `device`, its weights rounded to `weights`: the same numbers whatever `dtype` is."""
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    with torch.no_grad():  # gates and activations far from where they are linear
        for parameter in mixer.parameters():
            parameter.mul_(2)
    mixer = mixer.to(weights).to(device, dtype)
    if unrolled and hasattr(mixer, "sequences"):
        mixer.sequences = Unrolled()
    return mixer


def mixed(mixer: nn.Module, x: Tensor, **options) -> Tensor:
    """What `mixer` makes of x; HGRN2 with the lower bounds that a model would give it."""
    if isinstance(mixer, HGRN2):
        wide = torch.promote_types(x.dtype, torch.float32)
        options["lower_bound"] = torch.linspace(0.1, 0.9, mixer.kv_key_dim, dtype=wide, device=x.device)
    return mixer(x, **options)


def trained(mixer: nn.Module, x: Tensor, dy: Tensor, **options) -> Tensors:
    """y, and the gradients of x and of every parameter, on the CPU."""
    parameter = next(mixer.parameters())
    x, dy = (z.to(parameter.device, parameter.dtype) for z in (x, dy))
    if "attention_mask" in options:  # boundaries of packed sequences stay on the host, which reads them for attention
        options["attention_mask"] = options["attention_mask"].to(parameter.device)
    x.requires_grad_()
    y = mixed(mixer, x, **options)
    names, leaves = zip(("x", x), *mixer.named_parameters(), strict=True)
    found = dict(zip((f"d{name}" for name in names), torch.autograd.grad(y, leaves, dy), strict=True))
    return {name: z.detach().cpu() for name, z in {"y": y, **found}.items()}


def assert_as_exact_as_plain(found: Tensors, exact: Tensors, plain: Tensors, dtype: torch.dtype) -> None:
    judge.compare(found, exact, [plain], dtype, 0.0, {}, units=UNITS)


@every_mixer
@both_precisions
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training(name, dtype, layout):
    """Forward and backward of packed sequences, and of a batch with padding on the left."""
    B = 1 if layout == "packed" else 2
    x, dy = torch.randn(2, B, T, D).to(dtype)
    if layout == "packed":
        real, options = torch.ones(B, T, 1), {"cu_seqlens": torch.tensor([0, *accumulate(LENGTHS)])}
    else:
        mask = (torch.arange(T) >= torch.tensor([[0], [37]])).long()
        real, options = mask[..., None], {"attention_mask": mask}
    dy = dy * real
    sources = (dtype, "cuda", False), (torch.float64, "cpu", True), (dtype, "cpu", True)
    found, exact, plain = (
        trained(mixer_of(name, kind, device, dtype, unrolled), x, dy, **options) for kind, device, unrolled in sources
    )
    for results in (found, exact, plain):
        results["y"] = results["y"] * real  # what comes out at padding is nobody's
    assert_as_exact_as_plain(found, exact, plain, dtype)


@every_mixer
@both_precisions
def test_decoding(name, dtype):
    """A prompt with padding on the left, then token after token through the cache, is all tokens at once."""
    prompt, total = 60, 68
    x = torch.randn(2, total, D).to(dtype)
    mask = (torch.arange(total) >= torch.tensor([[0], [37]])).long()
    mixer, cache = mixer_of(name, dtype, "cuda", dtype), {}
    with torch.no_grad():
        on_gpu = x.cuda()
        pieces = [mixed(mixer, on_gpu[:, :prompt], attention_mask=mask[:, :prompt].cuda(), cache=cache)]
        pieces += [mixed(mixer, on_gpu[:, t : t + 1], cache=cache) for t in range(prompt, total)]
        exact, plain = (
            mixed(mixer_of(name, kind, "cpu", dtype, unrolled=True), x.to(kind), attention_mask=mask)
            for kind in (torch.float64, dtype)
        )
    whole = torch.cat(pieces, 1).cpu()
    real = mask[..., None]
    for part in (slice(0, prompt), slice(prompt, total)):
        found, want, usual = ({"y": (y * real)[:, part]} for y in (whole, exact, plain))
        assert_as_exact_as_plain(found, want, usual, dtype)
