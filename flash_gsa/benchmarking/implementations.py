"""What is timed: this package's backends, FLA's operator, and softmax attention of equal width in PyTorch.

An implementation has inputs of its own for a shape (what a layer would hand to it), a function of them, and the
definition of what it computes, written to run in any precision. It is judged by that definition.
"""

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_gsa.errors import UsageError, did_you_mean
from flash_gsa.ops import Problem, backend_names, explain, gated_slot_attention, gated_slot_attention_step

from .shapes import Shape

Tensors = dict[str, Any]
"""Tensors by their names in the equations."""

CPU = torch.device("cpu")

RECOMPUTE = "recompute"
"""What `auto` runs, with states="recompute"."""

SOFTMAX = {"sdpa-cudnn": "CUDNN_ATTENTION", "sdpa-flash": "FLASH_ATTENTION"}
"""Kernels of `torch.nn.functional.scaled_dot_product_attention`, by the names used here."""


class Implementation:
    """One thing that is timed. `name` is what `--peers` calls it."""

    name: str
    gated_slots = True
    """Whether it computes gated slot attention, so that the bytes nothing can avoid are those of `Shape`."""
    decodes = False
    own = False
    """Whether it is this package's."""

    def reason_against(self, shape: Shape, device: torch.device) -> str | None:
        """None if it can run `shape`, else why not."""
        raise NotImplementedError

    def inputs(self, shape: Shape, device: torch.device) -> Tensors:
        """Random inputs as a trained layer has them, the same for the same shape."""
        raise NotImplementedError

    def token_inputs(self, shape: Shape, device: torch.device) -> Tensors:
        """The same for `step`, of one token each."""
        return self.inputs(replace(shape, T=1), device)

    def forward(self, x: Tensors, shape: Shape) -> Tensor:
        """o [B, T, HQ, V]."""
        raise NotImplementedError

    def definition(self, x: Tensors, shape: Shape) -> Tensor:
        """The same o by the shortest way to write it, in x's precision; for small shapes."""
        raise NotImplementedError

    def by_products(self, x: Tensors, shape: Shape) -> Tensor:
        """The same o, in x's precision, by matrix products; for shapes of any size where `gated_slots`."""
        return recurrence(x, shape, backend="chunk")[0]

    def backend(self, shape: Shape, device: torch.device) -> str | None:
        """Which backend of this package's operator runs, None for other packages."""
        return None

    def step(self, x: Tensors, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(o, new state) of one token: x as `token_inputs`; the state may be updated in its memory."""
        raise NotImplementedError

    def state(self, flat: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The numbers `flat` as a state (hk [B, H, K, M], hv [B, H, M, V]), in memory as a prefill leaves it."""
        B, H, K, V, M = shape.B, shape.H, shape.K, shape.V, shape.M
        hk, hv = flat.split([B * H * K * M, B * H * M * V])
        return hk.view(B, H, K, M), hv.view(B, H, M, V)


class Ours(Implementation):
    """`flash_gsa.gated_slot_attention`; `name` is "auto", a backend's, or "recompute".

    The last is "auto" with states="recompute": the backward computes the states between chunks again.
    """

    own = True

    def __init__(self, name: str):
        self.name = name
        self.decodes = name != RECOMPUTE  # which concerns backwards alone
        self._asked = "auto" if name == RECOMPUTE else name

    def reason_against(self, shape: Shape, device: torch.device) -> str | None:
        reasons = dict(explain(_problem(shape, device)))
        return None if self._asked == "auto" else reasons[self._asked]

    def backend(self, shape: Shape, device: torch.device) -> str | None:
        if self._asked != "auto":
            return self._asked
        return next(name for name, reason in explain(_problem(shape, device)) if reason is None)

    def inputs(self, shape: Shape, device: torch.device) -> Tensors:
        return layer_inputs(shape, device)

    def forward(self, x: Tensors, shape: Shape) -> Tensor:
        return self.with_state(x, shape)[0]

    def with_state(self, x: Tensors, shape: Shape, final: bool = False) -> tuple[Tensor, Any]:
        """(o, final state)."""
        on_cpu, on_device = boundaries(shape), boundaries(shape, x["q"].device)
        return gated_slot_attention(
            **x,
            cu_seqlens=on_device if _is_captured(x["q"].device) else on_cpu,
            output_final_state=final,
            states="recompute" if self.name == RECOMPUTE else "keep",
            backend=self._asked,
        )

    def definition(self, x: Tensors, shape: Shape) -> Tensor:
        return recurrence(x, shape)[0]

    def step(self, x: Tensors, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        token = {name: tensor[:, 0] for name, tensor in x.items()}
        # In place, as generation does it; FLA always makes a new state.
        return gated_slot_attention_step(**token, state=state, backend=self._asked, in_place=True)

    def state(self, flat: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        hk, hv = super().state(flat, shape)
        return hk.view(shape.B, shape.H, shape.M, shape.K).transpose(2, 3), hv  # by slots


class Fla(Implementation):
    """`fla.ops.gsa.chunk_gsa`, and `fused_recurrent_gsa` for a single token.

    Its layer computes s = 1 - e^g itself and, for grouped queries, repeats k, v and the gates for every query head.
    Both are done here before the clock starts. A single token's are not repeated, although its layer does: its kernel
    for one takes grouped queries as they are, with states as small as ours.
    """

    name = "fla"
    decodes = True

    def reason_against(self, shape: Shape, device: torch.device) -> str | None:
        if importlib.util.find_spec("fla") is None:
            return "flash-linear-attention is not installed"
        return None if device.type == "cuda" else "its kernels need a GPU"

    def inputs(self, shape: Shape, device: torch.device) -> Tensors:
        x, group = self._ungrouped(shape, device), shape.HQ // shape.H
        return {name: y if name == "q" else y.repeat_interleave(group, 2) for name, y in x.items()}

    def token_inputs(self, shape: Shape, device: torch.device) -> Tensors:
        return self._ungrouped(replace(shape, T=1), device)

    def _ungrouped(self, shape: Shape, device: torch.device) -> Tensors:
        x = layer_inputs(shape, device)
        return x | {"s": -torch.expm1(x["g"]).to(x["k"].dtype)}

    def forward(self, x: Tensors, shape: Shape) -> Tensor:
        from fla.ops.gsa import chunk_gsa

        # The same tensor for every call, as in the layers of a model: it keeps what it finds out of one.
        return chunk_gsa(**x, scale=1.0, cu_seqlens=boundaries(shape, x["q"].device))[0]

    def definition(self, x: Tensors, shape: Shape) -> Tensor:
        return recurrence(x, shape)[0]

    def step(self, x: Tensors, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        from fla.ops.gsa import fused_recurrent_gsa

        with torch.no_grad():
            o, new = fused_recurrent_gsa(**x, scale=1.0, initial_state=state, output_final_state=True)
        return o[:, 0], (new[0], new[1])


class Softmax(Implementation):
    """Causal softmax attention of equal width by one kernel of PyTorch; heads wider than 128 are cut into 128s."""

    gated_slots = False

    def __init__(self, name: str):
        self.name = name

    def reason_against(self, shape: Shape, device: torch.device) -> str | None:
        if shape.lengths:
            return "packed sequences are not measured with it"
        return "there is no cuDNN on a CPU" if self.name == "sdpa-cudnn" and device.type == "cpu" else None

    def inputs(self, shape: Shape, device: torch.device) -> Tensors:
        x = layer_inputs(shape, device)
        size = min(128, shape.K)
        return {name: x[name].unflatten(3, (-1, size)).flatten(2, 3) for name in ("q", "k", "v")}

    def forward(self, x: Tensors, shape: Shape) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(getattr(SDPBackend, SOFTMAX[self.name])):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.HQ != shape.H)
        return o.transpose(1, 2)

    def definition(self, x: Tensors, shape: Shape) -> Tensor:
        group = x["q"].shape[2] // x["k"].shape[2]
        k, v = (x[name].repeat_interleave(group, 2) for name in ("k", "v"))
        scores = torch.einsum("bthk,bshk->bhts", x["q"], k) * k.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=k.device).triu(1)
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(later, float("-inf")).softmax(-1), v)

    def by_products(self, x: Tensors, shape: Shape) -> Tensor:
        return self.definition(x, shape)


@cache
def implementation(name: str) -> Implementation:
    """The implementation called `name`. Raises UsageError if there is none."""
    if name not in (known := implementation_names()):
        raise UsageError(f"there is no {name!r} to measure; choose of {', '.join(known)}.{did_you_mean(name, known)}")
    if name == "fla":
        return Fla()
    return Softmax(name) if name in SOFTMAX else Ours(name)


def implementation_names() -> list[str]:
    """All that can be measured somewhere: "auto", "recompute", each backend of the operator, then the peers."""
    return ["auto", RECOMPUTE, *backend_names(), *SOFTMAX, "fla"]


def layer_inputs(shape: Shape, device: torch.device) -> Tensors:
    """q, k, v: SiLU of normal numbers; g: logsigmoid(N(0, 1)) / 8 in float32."""
    random = torch.Generator(device).manual_seed(0)

    def normal(heads: int, size: int) -> Tensor:
        return torch.randn(shape.B, shape.T, heads, size, generator=random, device=device)

    q, k, v = normal(shape.HQ, shape.K), normal(shape.H, shape.K), normal(shape.H, shape.V)
    x = {name: F.silu(y).to(measured_dtype(device)) for name, y in (("q", q), ("k", k), ("v", v))}
    return x | {"g": F.logsigmoid(normal(shape.H, shape.M)) / 8}


def measured_dtype(device: torch.device) -> torch.dtype:
    """What models are trained in there: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@cache
def boundaries(shape: Shape, device: torch.device = CPU) -> Tensor | None:
    """`cu_seqlens` of packed sequences, the same tensor for every call."""
    return None if shape.boundaries is None else torch.tensor(shape.boundaries, device=device)


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, into which nothing can be copied from the CPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def recurrence(x: Tensors, shape: Shape, final: bool = False, backend: str = "reference", **options: Any) -> Any:
    """(o, final state) by a backend that runs in any precision."""
    return gated_slot_attention(**x, cu_seqlens=boundaries(shape), output_final_state=final, backend=backend, **options)


def _problem(shape: Shape, device: torch.device) -> Problem:
    sizes = (shape.B, shape.T, shape.HQ, shape.H, shape.K, shape.V, shape.M)
    return Problem(*sizes, measured_dtype(device), device.type, packed=bool(shape.lengths))
