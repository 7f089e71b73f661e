"""`GSACache`: what a model carries from one piece of a sequence to the next."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


class GSACache(MutableMapping[int, dict[str, Any]]):
    """One entry a layer, replaced whole by the layer at every forward pass.

    A GSA layer's entry holds `state`: (hk [B, H, K, M], hv [B, H, M, V]), and, where the layer has them, `conv`
    (the last inputs of its short convolutions) and `normalizer` (ABC). One of gated linear attention (GLA, HGRN2,
    RetNet) holds `state` [B, H, K, V] float32, `conv` and, in RetNet, `seen` [B], the tokens so far. One of softmax
    attention holds `k`, `v` [B, L, H, D], `real` [B, L] (which of them are tokens; None: all) and `seen`. These
    grow with the sequence, up to the window; all others are of constant size.

    The methods are those that `transformers`' `generate()` calls.

    Args:
        state_dtype: in what GSA layers' states are kept, torch.float32 or torch.bfloat16: half the memory and half the
            traffic of a token, right where slots remember up to some hundred tokens and not beyond, see
            `flash_gsa.gated_slot_attention_step`. What other mixers keep, and float64, is left as it is.

    Raises:
        UsageError: another dtype.
    """

    is_compileable = False

    def __init__(self, state_dtype: torch.dtype = torch.float32) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype!r}")
        self.state_dtype = state_dtype
        self._layers: dict[int, dict[str, Any]] = {}
        self._seen = 0

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self._layers[layer_idx]

    def __setitem__(self, layer_idx: int, entry: dict[str, Any]) -> None:
        state = entry.get("state")
        if self.state_dtype == torch.bfloat16 and isinstance(state, tuple):  # a pair is gated slot attention's
            narrow = (x.to(torch.bfloat16) if x.dtype == torch.float32 else x for x in state)
            entry = entry | {"state": tuple(narrow)}
        self._layers[layer_idx] = entry

    def __delitem__(self, layer_idx: int) -> None:
        del self._layers[layer_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __bool__(self) -> bool:
        # An empty cache is a cache to be filled, not the absence of one.
        return True

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen; the model calls it once a forward pass."""
        self._seen += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far (padding included)."""
        return self._seen

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    get_max_cache_shape = get_max_length

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(x.numel() * x.element_size() for entry in self.values() for x in _tensors(entry))

    def clone(self) -> "GSACache":
        """A cache that can go its own way: tensors are never changed in place, so they are shared."""
        return self._mapped(lambda x: x)

    def detach(self) -> "GSACache":
        """The same contents cut from the graph that computed them."""
        return self._mapped(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "GSACache":
        """The same contents on another device. (Not to another dtype: that is `state_dtype`.)"""
        return self._mapped(lambda x: x.to(*args, **kwargs))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, for each row of the batch, the history of row `beam_idx[row]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._layers = self._mapped(lambda x: x.index_select(0, indices.to(x.device)))._layers

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._layers = self._mapped(lambda x: x.repeat_interleave(repeats, dim=0))._layers

    def reset(self) -> None:
        """Forget everything."""
        self._layers, self._seen = {}, 0

    def _mapped(self, function) -> "GSACache":
        new = GSACache(self.state_dtype)
        new._seen = self._seen
        new._layers = {i: {name: _map(x, function) for name, x in e.items()} for i, e in self.items()}
        return new


def _map(x: Any, function) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, tuple):
        return tuple(_map(y, function) for y in x)
    return x


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
