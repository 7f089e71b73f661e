"""Activations by their configuration name: of queries and keys, of values, of the output."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def _identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "relu": F.relu,
    "identity": _identity,
    "softmax": _softmax,
}
ACTIVATIONS = {name: FEATURE_MAPS[name] for name in ("swish", "identity")}
