"""What a training step holds at its worst moment, found by running one on tensors that have sizes and no contents.

Model, loss and backward are the real ones, under `FakeTensorMode`; every storage is counted while it lives. In place of
this package's GPU kernels stands what each returns, keeps for its backward and takes meanwhile. What cuBLAS or an
attention kernel takes for itself is not seen. Blocks under `torch.compile` keep less than is counted here.
"""

import functools
import json
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from flash_gsa.layers import gated_slot_attention as gsa_layer
from flash_gsa.layers import norm
from flash_gsa.layers.sequences import WholeSequences
from flash_gsa.models import GSAConfig, GSAForCausalLM
from flash_gsa.models import loss as losses
from flash_gsa.ops import linears, pointwise
from flash_gsa.ops.products import product_dtype
from flash_gsa.ops.triton.tiles import choose
from flash_gsa.training.engine import checkpoint_blocks


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment when a forward and backward hold the most.

    Attributes:
        working: activations kept for the backward, logits, and what operations take meanwhile.
        gradients: those of weights that exist at that moment, by the share that was asked for.
    """

    working: int
    gradients: int


@functools.lru_cache(maxsize=64)
def step_memory(
    config_json: str,
    rows: int,
    length: int,
    weights: torch.dtype,
    products: torch.dtype,
    checkpointing: Literal["none", "all"] | int,
    accumulating: bool,
    gradient_share: float,
) -> StepMemory:
    """Memory of a micro-batch, beside weights and moments.

    Args:
        config_json: a `GSAConfig` as JSON.
        rows, length: of the micro-batch of one process.
        weights, products: number formats; where they differ, autocast casts, as in training.
        checkpointing: as in the recipe's section `engine`.
        accumulating: gradients of a micro-batch before are there.
        gradient_share: the part of a gradient that stays, once it is whole.
    """
    config = GSAConfig.from_dict(json.loads(config_json))
    with FakeTensorMode(), _sizes_only():
        model = AutoModelForCausalLM.from_config(config, dtype=weights).train()
        checkpoint_blocks(model, checkpointing)
        for module in model.modules():
            if hasattr(module, "sequences"):
                module.sequences = _SizesOnly()
        if accumulating:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        with _Live(model, gradient_share) as live:
            _run(model, rows, length, products)
    return StepMemory(live.worst - live.worst_gradients, live.worst_gradients)


def _run(model: GSAForCausalLM, rows: int, length: int, products: torch.dtype) -> None:
    """Forward and backward of one micro-batch, as in training."""
    ids, targets = (torch.zeros(1, rows * length, dtype=torch.int64) for _ in range(2))
    same = products == model.lm_head.weight.dtype
    with nullcontext() if same else torch.autocast("cpu", dtype=products):
        # Ids themselves are looked at on a CPU, and these have no values.
        hidden = model.model(inputs_embeds=model.model.embeddings(ids)).last_hidden_state
        loss = losses.next_token_loss(hidden, model.lm_head.weight, targets, scored=rows * length)
    loss.backward()


class _Live(TorchDispatchMode):
    """Bytes of all storages made within it, while they live, and the most there have been."""

    def __init__(self, model: nn.Module, gradient_share: float):
        super().__init__()
        self._share = gradient_share
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self._known = {x.untyped_storage()._cdata for x in (*model.parameters(), *gradients)}
        self._whole = {id(p) for p in model.parameters() if p.grad is not None}
        self._bytes = self.worst = self.worst_gradients = 0
        self._gradients = sum(x.untyped_storage().nbytes() for x in gradients)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._added)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._saw(x.untyped_storage())
        return out

    def _saw(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        weakref.finalize(storage, self._gone, key, size)
        self._bytes += size
        held = self._bytes + int(self._share * self._gradients)
        if held > self.worst:
            self.worst, self.worst_gradients = held, int(self._share * self._gradients)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size

    def _added(self, parameter: Tensor) -> None:
        """A gradient that was made in this backward is whole: from now on it counts as one."""
        assert parameter.grad is not None
        if id(parameter) not in self._whole:
            self._whole.add(id(parameter))
            size = parameter.grad.untyped_storage().nbytes()
            self._bytes -= size
            self._gradients += size


class _SizesOnly(WholeSequences):
    """Mixing along time by what the kernels would take, without their arithmetic."""

    def gated_slot_attention(self, *inputs, **options):
        q, k, v, g, s = (*inputs, None)[:5]
        return _Slots.apply(q, k, v, g, s, options["states"] == "recompute"), None

    def gated_linear_attention(self, *inputs, **options):
        q, k, v, g = inputs
        return _Linear.apply(q, k, v, g.expand_as(k)), None

    def abc_gates(self, logits, normalizer, cu_seqlens):
        return *_Abc.apply(logits), None


@contextmanager
def _sizes_only() -> Iterator[None]:
    """Within it, what a kernel computes beside the operator on a GPU takes what it would take there."""
    replaced = (
        (gsa_layer, "silu_each", lambda q, k, v: tuple(_Same.apply(x) for x in (q, k, v))),
        (gsa_layer, "log_gates", lambda f, _: _Gates.apply(f)),
        (norm, "silu_norm", lambda x, weight, _: _Norm.apply(x, weight)),
        (norm, "add_norm", lambda x, branch, weight, _: _AddNorm.apply(x, branch, weight)),
        # What keeps less around products is the real thing, but for the kernels in it.
        (pointwise, "uses_kernels", lambda *_: True),
        (pointwise, "kernels", _Kernels),
        (F, "rms_norm", lambda x, shape, weight=None, eps=None: _Norm.apply(x, weight)),
        # On a CPU it would look for targets that are not scored.
        (losses, "_rows", lambda hidden, targets: (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))),
        (losses, "_fused", lambda _: True),
        (losses, "_row_losses", lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.float32)),
        (losses, "add_product", lambda *_: None),
        (linears, "product", lambda a, b, dtype: a.new_empty(a.shape[0], b.shape[1], dtype=dtype)),
        (losses, "_scaled", lambda x, _, dtype: torch.empty_like(x, dtype=dtype)),
    )
    with ExitStack() as stack:
        for module, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def _shared(q: Tensor, k_width: int, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """What the kernels prepare of gates, and the states between chunks: as `ops/triton/passes.py` keeps them."""
    sums = torch.empty_like(g, dtype=torch.float64 if q.dtype == torch.float32 else torch.float32)
    return sums, torch.empty_like(g, dtype=_half(q)), *_states(q, k_width, v, g)


def _states(q: Tensor, k_width: int, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The states between chunks."""
    B, T, H, M = g.shape
    tiles = choose(q.dtype, k_width, v.shape[3], M, q.shape[2] // H, torch.device("cpu"))
    between = B * T // tiles.C  # at most, however the tokens are cut into rows and documents
    hk, hv = (g.new_empty(between, H, M, width, dtype=_half(q)) for width in (k_width, v.shape[3]))
    return hk, hv


def _half(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


class _Slots(Function):
    """Gated slot attention."""

    @staticmethod
    def forward(ctx, q, k, v, g, s, recompute):
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        shared = _shared(q, k.shape[3], v, g)
        ctx.recompute = recompute
        p = q.new_empty(*q.shape[:3], g.shape[3], dtype=shared[1].dtype)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, g, s, *shared[: 2 if recompute else 4], p, lse)
        return q.new_empty(*q.shape[:3], v.shape[3])

    @staticmethod
    def backward(ctx, do):
        q, k, v, g, s, *_, p, _ = ctx.saved_tensors
        again = _states(q, k.shape[3], v, g) if ctx.recompute else ()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg, ds = torch.empty_like(g, dtype=torch.float32), None if s is None else torch.empty_like(s)
        # Read, written and carried parts of gates' gradients; those of states lie where dv and the states are.
        meanwhile = torch.empty_like(p), torch.empty_like(g, dtype=torch.float32), torch.empty_like(g, dtype=p.dtype)
        del meanwhile, again
        return dq, dk, dv, dg.to(g.dtype), ds, None


class _Linear(Function):
    """Gated linear attention: the second pass of the above, its keys in the place of the slots."""

    @staticmethod
    def forward(ctx, q, k, v, g):
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        *gates, _, states = _shared(q, 0, v, g)
        ctx.save_for_backward(q, k, v, g, *gates, states)
        return q.new_empty(*q.shape[:3], v.shape[3])

    @staticmethod
    def backward(ctx, do):
        q, k, v, g, *_, states = ctx.saved_tensors
        meanwhile = torch.empty_like(states), torch.empty_like(q), torch.empty_like(g, dtype=torch.float32)
        del meanwhile
        return *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(g)


class _Abc(Function):
    """Gates of ABC."""

    @staticmethod
    def forward(ctx, logits):
        g, s = torch.empty_like(logits, dtype=torch.float32), torch.empty_like(logits, dtype=torch.float32)
        ctx.save_for_backward(g, s)
        ctx.dtype = logits.dtype
        return g, s

    @staticmethod
    def backward(ctx, dg, ds):
        return torch.empty_like(dg, dtype=ctx.dtype)


class _Same(Function):
    """A function of each number that reads its input again in the backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(ctx.saved_tensors[0])


class _Gates(Function):
    """Log gates in float32 from logits."""

    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return torch.empty_like(f, dtype=torch.float32)

    @staticmethod
    def backward(ctx, dg):
        return torch.empty_like(ctx.saved_tensors[0])


class _Kernels:
    """Around products."""

    @staticmethod
    def swiglu_product(gate, up):
        return torch.empty_like(gate)

    @staticmethod
    def swiglu_gradients(gate, up, dproduct, again, last_use):
        return gate, up

    @staticmethod
    def silu_normed(x, weight, eps):
        return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)

    @staticmethod
    def silu_norm_gradients(x, weight, inverse, dy, again):
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class _AddNorm(Function):
    """A sum and its RMSNorm by one kernel: keeps the sum and one number a row."""

    @staticmethod
    def forward(ctx, x, branch, weight):
        total = x if branch is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
        ctx.save_for_backward(total, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        return total, torch.empty_like(total, dtype=product_dtype(total))

    @staticmethod
    def backward(ctx, dtotal, dy):
        total, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(total)
        return *(None if dtype is None else dx.to(dtype) for dtype in ctx.dtypes), torch.empty_like(weight)


class _Norm(Function):
    """RMSNorm by one kernel: keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
