"""Cases, inputs, an oracle of its own, and the measure of error, for the operator's tests.

Each test is written once and runs over every registered backend and every device. A backend is judged
against the recurrence in float64 (`exact`) and may be at most twice as far from it as the recurrence in
float32 is (`plain`), both written here from the equations, without the package's code.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_gsa import gated_slot_attention
from flash_gsa.ops import Problem, explain

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `lengths` makes it packed (then B = 1 and T is their sum)."""

    T: int = 65
    B: int = 2
    HQ: int = 2
    H: int = 2
    K: int = 8
    V: int = 12
    M: int = 9
    strength: bool = False
    scale: float = 1.0
    state: bool = True
    lengths: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.lengths is not None:
            object.__setattr__(self, "B", 1)
            object.__setattr__(self, "T", sum(self.lengths))

    @property
    def sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor([0, *accumulate(self.lengths)])

    def __str__(self) -> str:
        default = Case()
        names = [name for name in asdict(self) if getattr(self, name) != getattr(default, name)]
        return ",".join(f"{name}={getattr(self, name)}" for name in names).replace(" ", "") or "default"


CASES = [
    Case(),
    Case(T=1),
    Case(T=2, strength=True),
    Case(T=15, M=1),
    Case(T=16, K=5, V=3, M=3),
    Case(T=17, HQ=4, H=2, scale=0.35),
    Case(T=63, HQ=4, H=1, strength=True),
    Case(T=64, B=1, state=False),
    Case(T=65, M=33, K=16, V=7),
    Case(T=130, HQ=2, H=1, M=3, strength=True, scale=2.0),
    Case(T=300, B=1, HQ=4, H=2, K=6, V=4),
    Case(T=20, K=1, V=1, M=1, HQ=1, H=1, B=3),
    Case(lengths=(17, 64, 1, 130, 5)),
    Case(lengths=(0, 40, 66), HQ=4, H=2, strength=True),
    Case(lengths=(70, 0, 0, 9), state=False),
    Case(lengths=(3, 65, 0), scale=0.5),
    Case(lengths=(0, 0, 80, 0), M=3),
    Case(lengths=(33,)),
    Case(lengths=(0, 0, 0), strength=True),
    Case(T=0),
]


def make(case: Case, seed: int = 0) -> Tensors:
    """float32 inputs as a trained layer has them: SiLU of normal numbers, gates logsigmoid(N(0, 1)) / 8."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    B, T, H, M, N = case.B, case.T, case.H, case.M, case.sequences
    x = {
        "q": F.silu(normal(B, T, case.HQ, case.K)),
        "k": F.silu(normal(B, T, H, case.K)),
        "v": F.silu(normal(B, T, H, case.V)),
        "g": F.logsigmoid(normal(B, T, H, M)) / 8,
    }
    if case.strength:
        x["s"] = torch.rand(B, T, H, M, generator=random)
    if case.state:
        x |= {"hk": normal(N, H, case.K, M), "hv": normal(N, H, M, case.V)}
    return x


def skip_unless_able(backend: str, x: Tensors, case: Case) -> None:
    """Skip the test, with the reason, where the backend says that it cannot run x."""
    q, k, v, g = x["q"], x["k"], x["v"], x["g"]
    problem = Problem(
        *q.shape[:3], k.shape[2], k.shape[3], v.shape[3], g.shape[3], q.dtype, q.device.type, case.lengths is not None
    )
    if reason := dict(explain(problem))[backend]:
        pytest.skip(f"{backend}: {reason}")


def call(backend: str, x: Tensors, case: Case, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(o, hk, hv) of `backend`; skips the test where the backend says that it cannot."""
    skip_unless_able(backend, x, case)
    q, k, v, g = x["q"], x["k"], x["v"], x["g"]
    o, state = gated_slot_attention(
        q,
        k,
        v,
        g,
        x.get("s"),
        scale=case.scale,
        initial_state=(x["hk"], x["hv"]) if "hk" in x else None,
        output_final_state=True,
        cu_seqlens=case.cu_seqlens,
        backend=backend,
        **options,
    )
    assert state is not None
    return o, *state


def trained(backend: str, x: Tensors, case: Case, zeros: bool = False) -> Tensors:
    """o and gradients of o alone, as in training; with `zeros` from states of zeros, and with final states that nobody
    uses."""
    options: dict[str, Any] = {"scale": case.scale, "cu_seqlens": case.cu_seqlens, "backend": backend}
    if zeros:
        sizes = (case.sequences, case.H, case.K, case.M), (case.sequences, case.H, case.M, case.V)
        of_nothing = tuple(torch.zeros(size, device=x["q"].device) for size in sizes)
        options |= {"initial_state": of_nothing, "output_final_state": True}

    def function(z: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        o, _ = gated_slot_attention(z["q"], z["k"], z["v"], z["g"], z.get("s"), **options)
        return o, o.new_zeros(0), o.new_zeros(0)

    return with_gradients(function, {name: y for name, y in x.items() if name in "qkvgs"})


def recurrence(x: Tensors, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(o, hk, hv) token by token from the equations, in `dtype`."""
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    s = x["s"] if "s" in x else -torch.expm1(x["g"])
    group = case.HQ // case.H
    bounds = [0, *accumulate(case.lengths)] if case.lengths is not None else [0, case.T]
    outputs, keys, values = [], [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        rows = slice(None) if case.lengths is None else slice(n, n + 1)
        N = case.sequences if case.lengths is None else 1
        hk = x["hk"][rows] if "hk" in x else torch.zeros(N, case.H, case.K, case.M, dtype=dtype)
        hv = x["hv"][rows] if "hv" in x else torch.zeros(N, case.H, case.M, case.V, dtype=dtype)
        tokens = zip(*(y[:, start:end].unbind(1) for y in (x["q"], x["k"], x["v"], x["g"], s)), strict=True)
        for q, k, v, g, strength in tokens:
            forget = g.exp()
            hk = hk * forget[:, :, None] + torch.einsum("bhk,bhm->bhkm", k, strength)
            hv = hv * forget[..., None] + torch.einsum("bhm,bhv->bhmv", strength, v)
            scores = torch.einsum("bhk,bhkm->bhm", q, hk.repeat_interleave(group, 1))
            p = (case.scale * scores).softmax(-1)
            outputs.append(torch.einsum("bhm,bhmv->bhv", p, hv.repeat_interleave(group, 1)))
        keys.append(hk)
        values.append(hv)
    o = torch.stack(outputs, 1) if outputs else x["q"].new_zeros(case.B, 0, case.HQ, case.V)
    return o, torch.cat(keys), torch.cat(values)


def with_gradients(function, x: Tensors, dtypes: dict[str, torch.dtype] | None = None) -> Tensors:
    """`function(leaves) -> (o, hk, hv)`: these and the gradients of every input, from all three at once."""
    leaves = {n: t.detach().clone().to((dtypes or {}).get(n, t.dtype)).requires_grad_() for n, t in x.items()}
    results = dict(zip(("o", "hk", "hv"), function(leaves), strict=True))
    random = torch.Generator().manual_seed(99)
    loss = 0.0
    for y in results.values():
        # What comes back into o has o's format: numbers that every format can hold.
        weight = torch.randn(y.shape, generator=random).bfloat16().to(y.device, torch.float64)
        loss = loss + (y.double() * weight).sum()
    if loss.requires_grad:  # not so for a batch without tokens and states
        loss.backward()
    found = {n: y.detach() for n, y in results.items()}
    for name, leaf in leaves.items():
        found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def run(backend: str, x: Tensors, case: Case, device: torch.device | str = "cpu") -> Tensors:
    """Results and gradients of `backend` for x, brought back to the CPU."""
    on_device = {name: tensor.to(device) for name, tensor in x.items()}
    return {n: y.cpu() for n, y in with_gradients(lambda z: call(backend, z, case), on_device).items()}


def oracle(x: Tensors, case: Case, dtype: torch.dtype) -> Tensors:
    """Results and gradients of the recurrence in `dtype` throughout."""
    return with_gradients(lambda z: recurrence(z, case, dtype), x, dict.fromkeys(x, dtype))


def check(result: Tensors, x: Tensors, case: Case, units: int = 8) -> None:
    """Every result and gradient: finite, and at most twice as far from float64 as the float32 recurrence.

    x are the inputs as the backend saw them. The distance is the Euclidean norm. What plain float32 happens to hit
    by luck is covered by `units` in the last place of the result, and for gradients of what is
    subtracted in the backward of the softmax and of the cumulated gates, which is of the size of v ∘ dv.
    """
    exact, plain = oracle(x, case, torch.float64), oracle(x, case, torch.float32)
    assert result.keys() == exact.keys()
    moved = (exact["dv"] * x["v"].double()).norm()
    for name, y in result.items():
        want = exact[name]
        assert y.shape == want.shape, name
        assert y.isfinite().all(), f"{name} is not finite"
        rounded = plain[name].to(y.dtype).double()
        unit = EPS * (want.norm() + (moved if name.startswith("d") else 0.0)) + TINY * want.numel() ** 0.5
        error, allowed = (y.double() - want).norm(), 2 * (rounded - want).norm() + units * unit
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, norm {want.norm():.2e}"


def rounded(x: Tensors, dtype: torch.dtype) -> Tensors:
    """q, k, v in `dtype`; gates, strengths and states stay float32."""
    return {name: tensor.to(dtype) if name in "qkv" else tensor for name, tensor in x.items()}
