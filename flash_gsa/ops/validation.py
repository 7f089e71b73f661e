"""Every bad input of the operators refused with what was wrong, what was expected, what to do.

Shapes and dtypes are always checked; they cost nothing. Values (gates above 0, `cu_seqlens` out of
order) are checked whenever the tensor is on the CPU. On a GPU a look at values makes the host wait for
the device, so there they are checked only under the debug switch `FLASH_GSA_CHECK_VALUES=1`.
"""

import os
import sys

import torch
from torch import Tensor

from ..errors import UsageError

POLICIES = ("keep", "recompute")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_values_of(x: Tensor) -> bool:
    """Whether values of `x` may be looked at: on the CPU always, elsewhere under the debug switch."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return x.device.type == "cpu" or os.environ.get("FLASH_GSA_CHECK_VALUES", "0") not in ("", "0")


def state_dtype(q: Tensor) -> torch.dtype:
    """States are float32; float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_sequence(q, k, v, g, s, scale, initial_state, cu_seqlens) -> None:
    """Check the arguments of `gated_slot_attention`.

    Raises:
        UsageError: naming the argument and what it should have been.
    """
    _check_tensors(q, k, v, g, s, names=("B", "T"))
    _check_scale(scale)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape)
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, sequences, q, k, v, g)


def check_policy(states) -> None:
    """Check what `gated_slot_attention` shall keep of its states; raises UsageError."""
    if states not in POLICIES:
        raise UsageError(f"states must be 'keep' or 'recompute', got {states!r}")


def check_step(q, k, v, g, s, state, scale, in_place=False) -> None:
    """Check the arguments of `gated_slot_attention_step`; raises UsageError."""
    _check_tensors(q, k, v, g, s, names=("B",))
    _check_scale(scale)
    _check_state("state", state, q.shape[0], q, k, v, g, bfloat16_too=True)
    if in_place:
        _check_in_place(state, (q, k, v, g, s))


def check_linear_sequence(q, k, v, g, scale, initial_state, cu_seqlens) -> None:
    """Check the arguments of `gated_linear_attention`; raises UsageError."""
    _check_linear_tensors(q, k, v, g, names=("B", "T"))
    _check_scale(scale)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape)
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        _check_linear_state("initial_state", initial_state, sequences, q, k, v)


def check_linear_step(q, k, v, g, state, scale) -> None:
    """Check the arguments of `gated_linear_attention_step`; raises UsageError."""
    _check_linear_tensors(q, k, v, g, names=("B",))
    _check_scale(scale)
    _check_linear_state("state", state, q.shape[0], q, k, v)


def check_cu_seqlens(cu_seqlens: Tensor, q_shape: torch.Size) -> None:
    """`cu_seqlens` [S+1]: integers, first 0, non-decreasing, last = T, with B = 1; raises UsageError."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise UsageError(f"cu_seqlens must be an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise UsageError(
            "cu_seqlens must have shape [S+1] for S ≥ 1 packed sequences, "
            f"got {list(cu_seqlens.shape)}; for one sequence of length T give [0, T]"
        )
    batch, length = q_shape[:2]
    if batch != 1:
        raise UsageError(
            f"with cu_seqlens the batch dimension must be 1 (sequences are packed along time), got B = {batch}; "
            "reshape [B, T, …] to [1, B·T, …]"
        )
    if not check_values_of(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise UsageError(f"cu_seqlens must start with 0, got {values[0]}")
    if values[-1] != length:
        raise UsageError(f"cu_seqlens must end with T = {length}, got {values[-1]}")
    if (falling := (cu_seqlens.diff() < 0).nonzero()).numel():
        i = int(falling[0])
        raise UsageError(
            f"cu_seqlens must not decrease: cu_seqlens[{i}] = {values[i]} but cu_seqlens[{i + 1}] = {values[i + 1]}"
        )


def check_gates(name: str, g: Tensor) -> None:
    """g ≤ 0 everywhere (and not NaN), where values may be looked at; raises UsageError."""
    if not check_values_of(g) or g.numel() == 0:
        return
    largest = float(g.detach().amax())
    if largest != largest:
        raise UsageError(f"{name} contains NaN; look at what computed it (a NaN in the layer's input or weights)")
    if largest > 0:
        raise UsageError(
            f"{name} is a log forget gate and must be ≤ 0 everywhere, but its largest value is {largest:g}; "
            "use torch.nn.functional.logsigmoid(logits), or log(α) for α in (0, 1]"
        )


def _check_tensors(q, k, v, g, s, names: tuple[str, ...]) -> None:
    tensors = {"q": q, "k": k, "v": v, "g": g} | ({} if s is None else {"s": s})
    _check_common(tensors, names, gates="H, M")
    if s is not None and s.shape[-1] != g.shape[-1]:
        raise UsageError(f"s must have g's number of slots M = {g.shape[-1]}, got {s.shape[-1]}")
    if 0 in (k.shape[-1], v.shape[-1], g.shape[-1]):
        raise UsageError(f"K, V and M must be at least 1, got K = {k.shape[-1]}, V = {v.shape[-1]}, M = {g.shape[-1]}")
    check_gates("g", g)


def _check_linear_tensors(q, k, v, g, names: tuple[str, ...]) -> None:
    _check_common({"q": q, "k": k, "v": v, "g": g}, names, gates="H, K")
    if 0 in (k.shape[-1], v.shape[-1]):
        raise UsageError(f"K and V must be at least 1, got K = {k.shape[-1]}, V = {v.shape[-1]}")
    if g.shape[-1] not in (1, k.shape[-1]):
        raise UsageError(
            f"g must have one gate for each of the K = {k.shape[-1]} dimensions of a key, or 1 for all of them, "
            f"got {g.shape[-1]}"
        )
    check_gates("g", g)


def _check_common(tensors: dict, names: tuple[str, ...], gates: str) -> None:
    q, k, lead = tensors["q"], tensors["k"], len(names)
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise UsageError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != lead + 2:
            last = {"q": "HQ, K", "k": "H, K", "v": "H, V"}.get(name, gates)
            raise UsageError(
                f"{name} must have {lead + 2} dimensions [{', '.join(names)}, {last}], got {list(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise UsageError(f"{name} must be floating point (bfloat16, float16, float32 or float64), got {x.dtype}")
        if x.device != q.device:
            raise UsageError(f"all tensors must be on one device: q is on {q.device}, {name} on {x.device}")
    for name in ("k", "v"):
        if tensors[name].dtype != q.dtype:
            raise UsageError(
                f"q, k and v must have one dtype: q is {q.dtype}, {name} is {tensors[name].dtype}; "
                f"convert with {name}.to(q.dtype)"
            )
    for name, x in tensors.items():
        if x.shape[:lead] != q.shape[:lead]:
            raise UsageError(
                f"{name} must agree with q in [{', '.join(names)}] = {list(q.shape[:lead])}, got {list(x.shape[:lead])}"
            )
    heads = k.shape[lead]
    for name in ("v", "g", "s"):
        if name in tensors and tensors[name].shape[lead] != heads:
            raise UsageError(f"{name} must have k's {heads} heads, got {tensors[name].shape[lead]}")
    if heads == 0 or q.shape[lead] % heads or q.shape[lead] == 0:
        raise UsageError(
            f"the number of key/value heads H must divide the number of query heads HQ, got H = {heads}, "
            f"HQ = {q.shape[lead]}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise UsageError(f"q and k must have one head dimension K: q has {q.shape[-1]}, k has {k.shape[-1]}")


def _check_scale(scale) -> None:
    finite = isinstance(scale, (int, float)) and not isinstance(scale, Tensor) and abs(scale) <= sys.float_info.max
    if not finite:
        raise UsageError(f"scale must be a finite Python number, got {scale!r}")


def _check_state(name: str, state, sequences: int, q, k, v, g, bfloat16_too: bool = False) -> None:
    heads, K, V, M = k.shape[-2], k.shape[-1], v.shape[-1], g.shape[-1]
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise UsageError(f"{name} must be a pair (hk, hv), got {type(state).__name__}")
    half = bfloat16_too and q.dtype != torch.float64 and all(getattr(x, "dtype", None) == torch.bfloat16 for x in state)
    for part, x, shape, letters in (
        ("hk", state[0], (sequences, heads, K, M), "[N, H, K, M]"),
        ("hv", state[1], (sequences, heads, M, V), "[N, H, M, V]"),
    ):
        _check_one_state(f"{name}'s {part}", x, shape, letters, q, torch.bfloat16 if half else state_dtype(q))


def _check_linear_state(name: str, state, sequences: int, q, k, v) -> None:
    _check_one_state(name, state, (sequences, *k.shape[-2:], v.shape[-1]), "[N, H, K, V]", q, state_dtype(q))


def _check_one_state(name: str, x, shape: tuple[int, ...], letters: str, q, dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor) or tuple(x.shape) != shape:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"{name} must have shape {letters} = {list(shape)}, got {got} "
            "(N is the batch size, or with cu_seqlens the number of packed sequences)"
        )
    if x.dtype != dtype:
        raise UsageError(f"{name} must be {dtype} for {q.dtype} inputs, got {x.dtype}; convert with .to({dtype})")
    if x.device != q.device:
        raise UsageError(f"{name} is on {x.device}, but q is on {q.device}")


def _check_in_place(state, inputs) -> None:
    for part, x in zip(("hk", "hv"), state, strict=True):
        if x.requires_grad:
            raise UsageError(
                f"in_place=True overwrites state's {part}, which requires grad; give its .detach(), or in_place=False"
            )
        if _meets_itself(x):
            raise UsageError(
                f"in_place=True overwrites state's {part}, whose elements share memory (strides {list(x.stride())}); "
                "give its .contiguous(), or in_place=False"
            )
    if not torch.compiler.is_compiling() and _meet(*state):
        raise UsageError(
            "in_place=True overwrites both parts of the state, hk and hv, which lie in the same memory; give one of "
            "them as its .clone(), or in_place=False"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise UsageError(
            "in_place=True has no gradient, but an input requires grad; call it under torch.no_grad() or "
            "torch.inference_mode(), or give in_place=False"
        )


def _meets_itself(x: Tensor) -> bool:
    """Whether elements lie in one place, as those of an expanded tensor do."""
    steps = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if torch.compiler.is_compiling():  # which would have to be compiled again wherever sizes change the order
        return any(stride == 0 for stride, _ in steps)
    reach = 1
    for stride, size in sorted(steps):
        if stride < reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _meet(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share an element, if one of them fills its memory; else whether they begin in one place."""
    if x.numel() == 0 or y.numel() == 0 or x.is_meta or y.is_meta:
        return False
    first, second = ((t.data_ptr(), t.data_ptr() + t.element_size() * _reach(t)) for t in (x, y))
    for one, (begin, end), (other, last) in ((x, first, second), (y, second, first)):
        there = other < end and begin < last and (begin <= other or last <= end)
        if there and _reach(one) == one.numel():
            return True
    return first[0] == second[0]


def _reach(x: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
