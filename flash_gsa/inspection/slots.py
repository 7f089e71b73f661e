"""What the slots of a trained model do on a text.

Slot m of a head holds a weighted sum of the keys (and of the values) of past tokens. The weights obey

    W_0 = 0,    W_t[j, m] = α_tm W_{t-1}[j, m]  for j < t,    W_t[t, m] = s_tm

so that K̃_t = W_tᵀ k, and with them everything the head does at token t is

    p_t = softmax(K̃_t q_t)                 which slots it reads                       [M]
    a_t = W_t p_t                           which past tokens its output is made of:   [t]
    o_t = Σ_j a_tj v_j                      a_tj = Σ_m p_tm s_jm e^{G_tm − G_jm}

Multiplying W by the gates step by step keeps every factor in [0, 1] for any gate: no e^{−G} and no
difference of large sums appears.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.layers import GatedSlotAttention

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SlotActivity:
    """One query head of one layer on one text of T tokens; all arrays float64.

    Attributes:
        layer, head: counted from 0; `head` is a query head.
        read: p, how the head spreads its reading over the slots, [T, M]; rows sum to 1.
        write: s, how strongly each token is written into each slot, [T, M]; in [0, 1] for GSA.
        keep: α, the share of its content a slot keeps at each token, [T, M], in [0, 1].
        attention: a, the weight of token j's value in the output at token t, [T, T], zero for j > t. In GSA
            rows sum to at most 1; what is missing to 1 is the empty state that the slots started with.
    """

    layer: int
    head: int
    read: Array
    write: Array
    keep: Array
    attention: Array

    @property
    def half_life(self) -> Array:
        """After how many tokens at this gate half of a slot would be forgotten, [T, M]: ln 2 / −ln α; may be inf."""
        with np.errstate(divide="ignore"):
            return np.log(2) / -np.log(self.keep)

    @property
    def selectivity(self) -> float:
        """How much the slots read depend on the token, in bits: the mean over t of KL(p_t ‖ mean p)."""
        p, mean = self.read, self.read.mean(0)
        ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
        return float((p * np.log2(ratio)).sum(1).mean())


def gsa_layers(model: Any) -> list[int]:
    """Indices of the layers of `model` that are gated slot attention."""
    return [i for i, layer in enumerate(model.model.layers) if isinstance(layer.attn, GatedSlotAttention)]


def slot_activity(model: Any, token_ids: Sequence[int], layer: int, head: int) -> SlotActivity:
    """What one head does on one text; see `slot_activities`."""
    return slot_activities(model, token_ids, layers=[layer], heads=[head])[0]


@torch.no_grad()
def slot_activities(
    model: Any,
    token_ids: Sequence[int],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> list[SlotActivity]:
    """What heads do on a text, from one pass of the model.

    Args:
        model: a `GSAForCausalLM`; it stays in the mode it is in.
        token_ids: T token ids. Time and memory grow with T²·M for each head.
        layers: counted from 0; None: every gated slot attention layer.
        heads: query heads, counted from 0; None: all. Query head i reads the slots of key/value head
            i // (HQ / H).

    Returns:
        One record a head, by layer, then head.

    Raises:
        UsageError: no token, a model without gated slot attention, a layer or head the model does not have, or a
            layer that is not gated slot attention.
    """
    if len(token_ids) == 0:
        raise UsageError("there is no token to look at; give a text of at least one token")
    layers = gsa_layers(model) if layers is None else layers
    if not layers:
        raise UsageError("this model has no gated slot attention layer, so there are no slots to look at")
    inputs = layer_inputs(model, token_ids, layers)
    activities = []
    for layer in layers:
        attn = model.model.layers[layer].attn
        q, k, _, g, s = attn.project(inputs[layer])
        s = -torch.expm1(g.double()) if s is None else s
        group = q.shape[2] // k.shape[2]
        for head in range(q.shape[2]) if heads is None else heads:
            if not 0 <= head < q.shape[2]:
                raise UsageError(f"there is no head {head}; layer {layer} has query heads 0 to {q.shape[2] - 1}")
            kv = head // group
            arrays = _follow(q[0, :, head], k[0, :, kv], g[0, :, kv], s[0, :, kv])
            activities.append(SlotActivity(layer, head, *arrays))
    return activities


def layer_inputs(model: Any, token_ids: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
    """What the token mixers of `layers` are given when the model reads the text: [1, T, d] each."""
    depth = len(model.model.layers)
    usable = gsa_layers(model)
    for layer in layers:
        if not 0 <= layer < depth:
            raise UsageError(f"there is no layer {layer}; the model has layers 0 to {depth - 1}")
        if layer not in usable:
            kind = type(model.model.layers[layer].attn).__name__
            raise UsageError(f"layer {layer} is {kind} and has no slots; layers with slots: {usable}")
    seen: dict[int, Tensor] = {}
    hooks = []
    try:
        for layer in layers:

            def keep(_module: Any, args: tuple[Tensor, ...], layer: int = layer) -> None:
                seen[layer] = args[0]

            hooks.append(model.model.layers[layer].attn.register_forward_pre_hook(keep))
        device = next(model.parameters()).device
        model.model(torch.tensor([list(token_ids)], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _follow(q: Tensor, k: Tensor, g: Tensor, s: Tensor) -> tuple[Array, Array, Array, Array]:
    """Run one head's recurrence in terms of W: q, k [T, K], g, s [T, M] → read, write, keep, attention."""
    q, k, g, s = (x.detach().double().cpu() for x in (q, k, g, s))
    T, M = g.shape
    alpha = g.exp()
    scores = q @ k.T  # [T, T]
    weights = torch.zeros(T, M, dtype=torch.float64)
    read = torch.zeros(T, M, dtype=torch.float64)
    attention = torch.zeros(T, T, dtype=torch.float64)
    for t in range(T):
        past = weights[: t + 1]
        past *= alpha[t]
        past[t] = s[t]
        read[t] = torch.softmax(scores[t, : t + 1] @ past, dim=-1)
        attention[t, : t + 1] = past @ read[t]
    return read.numpy(), s.numpy(), alpha.numpy(), attention.numpy()
