"""The operator under the names that flash-linear-attention (FLA) gives it, and a switch that puts it there.

    from flash_gsa.integrations.fla import chunk_gsa, fused_recurrent_gsa   # as from fla.ops.gsa

    from flash_gsa.integrations import fla
    fla.enable()         # whatever calls FLA's two functions, its layers and models among them, now calls these

Both functions are called like those of FLA 0.6.0 and return the same things. The switch binds FLA's names to
stand-ins in every loaded module that has them. What the operator refuses, a stand-in hands to FLA's function, with a
warning that says why. docs/integrations.md: what is the same, what differs, what has been compared.
"""

import functools
import importlib
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UsageError, did_you_mean
from ..ops import abc_gates, backend_names, gated_slot_attention, gated_slot_attention_step
from ..ops.validation import state_dtype

__all__ = ["chunk_gsa", "disable", "enable", "enabled", "fused_recurrent_gsa"]

KNOWN_VERSIONS = ("0.5.2", "0.6.0")

Result = tuple[Tensor, list[Tensor] | list[None]]


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> Result:
    """`fla.ops.gsa.chunk_gsa`, computed by `flash_gsa.gated_slot_attention`.

        hk_t = hk_{t-1} ∘ e^{g_t} + k_t ⊗ s_t        hv_t = e^{g_t} ∘ hv_{t-1} + s_t ⊗ v_t
        o_t  = hv_tᵀ softmax(scale · hk_tᵀ q_t)

    Args:
        q: queries [B, T, HQ, K].
        k: keys [B, T, H, K]; H divides HQ, and query head i reads key/value head i // (HQ / H).
        v: values [B, T, H, V].
        s: write strengths [B, T, H, M]; if g is None the logits of ABC.
        g: log forget gates [B, T, H, M], ≤ 0. None: ABC, s is normalised over its own past, from the first token
            of this call on (in float32; nothing of it is carried in the state).
        scale: factor on the slot scores. None: K^-1/2.
        initial_state: (hk [N, H, K, M], hv [N, H, M, V]) of any floating-point dtype; None or (None, None): zeros.
            N is B, or the number of packed sequences.
        output_final_state: also return the states after the last token.
        checkpoint_level: 0, 1 or 2. In FLA it trades memory for time in the backward pass; here every level
            runs the same.
        cu_seqlens: [S+1] boundaries of packed sequences; then B = 1.
        cu_seqlens_cpu: the same on the CPU; reading it waits for no device.
        kwargs: `chunk_size`, a power of two, is accepted: results do not depend on it, and the operator chooses
            its own.

    Returns:
        o [B, T, HQ, V] in q's dtype, and [hk, hv] in float32 (float64 for float64 inputs), or [None, None] without
        output_final_state.

    Raises:
        UsageError (a ValueError): what `gated_slot_attention` refuses, and other keywords.
        DeprecationWarning: `head_first`, which FLA has removed; as there.

    Source: FLA 0.6.0, `fla/ops/gsa/chunk.py`, for names, defaults and layouts.
    """
    return _chunk(
        "auto", q, k, v, s, g, scale, initial_state, output_final_state, checkpoint_level,
        cu_seqlens, cu_seqlens_cpu, **kwargs,
    )  # fmt: skip


def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`fla.ops.gsa.fused_recurrent_gsa`, computed by `flash_gsa.gated_slot_attention`.

    The same function as `chunk_gsa`, which explains the arguments; a single token without gradients is computed by
    `flash_gsa.gated_slot_attention_step`. Grouped queries work for any length (in FLA 0.6.0 for one token).

    Args:
        reverse: from the last token to the first: o_t reads tokens t and later, initial_state is what comes after
            the last token, and the returned state the one at the first. (Gates of ABC still run forward, as in FLA.)

    Returns:
        As `chunk_gsa`.

    Raises:
        UsageError (a ValueError): what `gated_slot_attention` refuses.

    Source: FLA 0.6.0, `fla/ops/gsa/fused_recurrent.py`, for names, defaults and layouts.
    """
    return _fused_recurrent("auto", q, k, v, s, g, scale, initial_state, output_final_state, reverse, cu_seqlens)


def _chunk(
    backend, /, q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, checkpoint_level=2,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
) -> Result:  # fmt: skip
    if "head_first" in kwargs:
        raise DeprecationWarning("head_first was removed by FLA; give tensors as [B, T, H, ...] and leave it out")
    chunk_size = kwargs.pop("chunk_size", None)
    if chunk_size is not None and (chunk_size <= 0 or chunk_size & (chunk_size - 1)):
        raise UsageError(f"chunk_size must be a power of two, got {chunk_size}; leave it out for the operator's own")
    if kwargs:
        name = min(kwargs)
        known = [*inspect.signature(chunk_gsa).parameters, "chunk_size"]
        raise UsageError(f"chunk_gsa has no argument {name!r}; leave it out.{did_you_mean(name, known)}")
    if checkpoint_level not in (0, 1, 2):
        raise UsageError(f"checkpoint_level must be 0, 1 or 2, got {checkpoint_level!r}")
    if cu_seqlens is not None and cu_seqlens_cpu is not None:
        cu_seqlens = cu_seqlens_cpu
    return _compute(backend, q, k, v, s, g, scale, initial_state, output_final_state, False, cu_seqlens)


def _fused_recurrent(
    backend, /, q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, reverse=False,
    cu_seqlens=None,
) -> Result:  # fmt: skip
    return _compute(backend, q, k, v, s, g, scale, initial_state, output_final_state, reverse, cu_seqlens)


def _compute(backend, q, k, v, s, g, scale, state, output_final_state, reverse, cu_seqlens) -> Result:
    if g is None:
        g, s = abc_gates(s, cu_seqlens=cu_seqlens)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if state is not None:
        given = any(x is not None for x in state)
        state = tuple(x if x is None else x.to(state_dtype(q)) for x in state) if given else None

    if q.shape[1] == 1 and state is not None and cu_seqlens is None and not _needs_gradient(q, k, v, s, g, *state):
        token = (x.squeeze(1) for x in (q, k, v, g, s))
        o, after = gated_slot_attention_step(*token, state=state, scale=scale, backend=backend)
        return o.unsqueeze(1), list(after) if output_final_state else [None, None]

    if reverse:
        q, k, v, g, s = (x.flip(1) for x in (q, k, v, g, s))
        state, cu_seqlens = _flip_sequences(state, cu_seqlens, q.shape[1])
    o, final = gated_slot_attention(
        q,
        k,
        v,
        g,
        s,
        scale=scale,
        initial_state=state,
        output_final_state=bool(output_final_state),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    if reverse:
        o = o.flip(1)
        final, _ = _flip_sequences(final, cu_seqlens, q.shape[1])
    return o, [None, None] if final is None else list(final)


def _needs_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _flip_sequences(state, cu_seqlens, length):
    """Turning packed tokens around also turns the order of the sequences around."""
    if cu_seqlens is None:
        return state, None
    return None if state is None else tuple(x.flip(0) for x in state), length - cu_seqlens.flip(0)


@dataclass(frozen=True, eq=False)
class _Request:
    """One wish that the switch be on; as long as there is any, it is."""

    backend: str


_OURS: dict[str, tuple[Callable, Callable]] = {
    "chunk_gsa": (chunk_gsa, _chunk),
    "fused_recurrent_gsa": (fused_recurrent_gsa, _fused_recurrent),
}
_lock = threading.RLock()
# The last one decides. The tuple is replaced as a whole, so that calls can read it without the lock.
_requests: tuple[_Request, ...] = ()
_standing: _Request | None = None  # the one of enable()
_bound: dict[str, tuple[Callable, Callable]] = {}  # name: FLA's function and its stand-in
_warned: set[str] = set()


def enable(backend: str = "auto") -> None:
    """From now on, what calls FLA's `chunk_gsa` and `fused_recurrent_gsa`, unmodified, runs on our operator.

    The two names are bound anew in every loaded module in which they are FLA's functions: in `fla.ops.gsa` itself
    (so in whatever is imported later), in FLA's layers, in model code from elsewhere. A call that our operator
    refuses goes to FLA's function; a RuntimeWarning says why, once a reason.

    Calling it again only changes `backend`. The switch is one for the process, and safe to use from several threads.

    Args:
        backend: "auto", or one of `flash_gsa.ops.backend_names()`: then what that backend cannot run goes to FLA.

    Raises:
        UsageError: FLA is missing, cannot be imported, or its two functions are not as we know them; or an unknown
            backend. Nothing has been changed then.
    """
    global _standing
    with _lock:
        request = _add(backend)
        if _standing is not None:
            _remove(_standing)
        _standing = request


def disable() -> None:
    """Undo `enable()`: every name is FLA's function again. Without an `enable()` before, nothing happens.

    A block `with enabled():` that is still running keeps the switch on until it ends.
    """
    global _standing
    with _lock:
        if _standing is not None:
            _remove(_standing)
            _standing = None


@contextmanager
def enabled(backend: str = "auto") -> Iterator[None]:
    """`enable()` for the length of a `with` block; afterwards as it was before. Blocks may be nested and may overlap.

    Raises:
        UsageError: as `enable`.
    """
    request = _add(backend)
    try:
        yield
    finally:
        _remove(request)


def _add(backend: str) -> _Request:
    global _requests
    if backend not in ("auto", *backend_names()):
        raise UsageError(
            f"backend {backend!r} does not exist; choose 'auto' or one of {', '.join(backend_names())}."
            + did_you_mean(backend, ["auto", *backend_names()])
        )
    request = _Request(backend)
    with _lock:
        if not _requests:
            _bind()
        _requests = (*_requests, request)
    return request


def _remove(request: _Request) -> None:
    global _requests
    with _lock:
        _requests = tuple(r for r in _requests if r is not request)
        if not _requests:
            for name, (theirs, stand_in) in _bound.items():
                _rebind(name, stand_in, theirs)


def _bind() -> None:
    for name, theirs in _fla_functions().items():
        # The same stand-in for the same function: a reference somebody kept to it works again too.
        if name not in _bound or _bound[name][0] is not theirs:
            _bound[name] = (theirs, _stand_in(name, _OURS[name][1], theirs))
        _rebind(name, *_bound[name])


def _rebind(name: str, old: Callable, new: Callable) -> None:
    for module in list(sys.modules.values()):
        # vars() rather than getattr: modules that import on access must not be woken.
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)


def _stand_in(name: str, ours: Callable, theirs: Callable) -> Callable:
    # Not FLA's attributes: torch.compile would take its mark not to trace this function for one on ours.
    @functools.wraps(theirs, assigned=("__name__", "__qualname__", "__doc__"), updated=())
    def stand_in(*args, **kwargs):
        requests = _requests
        if not requests:
            return theirs(*args, **kwargs)
        try:
            return ours(requests[-1].backend, *args, **kwargs)
        except UsageError as refusal:
            _warn_once(name, str(refusal))
        return theirs(*args, **kwargs)

    return stand_in


def _warn_once(name: str, reason: str) -> None:
    # Numbers aside: one reason with other sizes is the same reason.
    key = name + re.sub(r"\d+", "0", reason)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"{name} runs in FLA, not in flash-gsa: {reason}", RuntimeWarning, stacklevel=3)


def _fla_functions() -> dict[str, Callable]:
    """FLA's functions by name, if they are what the stand-ins can replace."""
    try:
        module = importlib.import_module("fla.ops.gsa")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fla":
            raise UsageError(
                "flash-linear-attention is not installed, so there is nothing to switch; "
                f"`pip install flash-linear-attention=={KNOWN_VERSIONS[-1]}`, or call chunk_gsa of this module yourself"
            ) from error
        raise UsageError(f"fla.ops.gsa cannot be imported ({error}); {_what_is_known()}") from error
    functions = {}
    for name, (ours, _) in _OURS.items():
        theirs = getattr(module, name, None)
        if theirs is None:
            raise UsageError(f"fla.ops.gsa has no {name}; {_what_is_known()}")
        if _arguments(theirs) != _arguments(ours):
            raise UsageError(
                f"fla.ops.gsa.{name} takes ({_arguments(theirs)}), where ({_arguments(ours)}) was expected; "
                f"{_what_is_known()}"
            )
        functions[name] = theirs
    return functions


def _arguments(function: Callable) -> str:
    """Names, kinds and defaults of the arguments, without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def _what_is_known() -> str:
    version = getattr(sys.modules.get("fla"), "__version__", "unknown")
    return (
        f"the switch knows flash-linear-attention {' and '.join(KNOWN_VERSIONS)}, and this is version {version}. "
        "Install one of those, or call chunk_gsa and fused_recurrent_gsa of flash_gsa.integrations.fla yourself"
    )
