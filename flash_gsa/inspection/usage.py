"""How a model uses its slots, in three numbers a layer, cheap enough to look at during training.

A head whose slots all forget at once, or that reads only a few of them, has less memory than it was given; slots that
nobody reads are this model's own failure.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_gsa.errors import UsageError
from flash_gsa.ops.api import own_precision

from .slots import gsa_layers

DEAD = 0.01
"""Of an equal share of the reading: a slot that gets less is dead."""


@torch.no_grad()
def slot_usage(model: Any, token_ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """What the slots of every gated slot attention layer do on a text.

    With p_t = softmax(K̃_t q_t) of a query head and p̄ its mean over the tokens:

        forgetting     mean of 1 - α_t over tokens, heads and slots
        slot_entropy   -Σ_m p̄_m ln p̄_m / ln M, mean over query heads: 1 where all slots are read alike, 0 where one is
        dead_slots     share of slots of which no query head's p̄ is above 0.01 / M

    Args:
        model: a `GSAForCausalLM`; it stays in the mode it is in.
        token_ids: T ids. Time grows with T for each layer, memory does not.

    Returns:
        {"forgetting": {layer: …}, "slot_entropy": …, "dead_slots": …}, layers counted from 0 as "0", "1", …; empty if
        the model has no such layer.

    Raises:
        UsageError: no token.

    Source: the tables of `slot_activities`, summed up.
    """
    if len(token_ids) == 0:
        raise UsageError("there is no token to look at; give a text of at least one token")
    layers = gsa_layers(model)
    if not layers:
        return {}
    found: dict[str, dict[str, float]] = {"forgetting": {}, "slot_entropy": {}, "dead_slots": {}}

    def look(attn: Any, arguments: tuple[Tensor, ...], layer: int) -> None:
        for name, value in _usage(attn, arguments[0]).items():
            found[name][str(layer)] = value

    # During the forward, because that is when weights that lie in shards are at hand.
    hooks = [model.model.layers[i].attn.register_forward_pre_hook(partial(look, layer=i)) for i in layers]
    try:
        device = next(model.parameters()).device
        model.model(torch.tensor([list(token_ids)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _usage(attn: Any, x: Tensor) -> dict[str, float]:
    """The three numbers of a layer whose input is x [1, T, d]."""
    q, k, _, g, s = attn.project(x)
    forgetting = -torch.expm1(g[0].float())
    with own_precision(q):
        read = _mean_read(q[0].float(), k[0].float(), g[0].float(), forgetting if s is None else s[0].float())
    H, M = g.shape[2:]
    entropy = -torch.special.xlogy(read, read).sum(-1) / torch.log(torch.tensor(float(max(M, 2))))
    most = read.view(H, -1, M).amax(1)
    return {
        "forgetting": float(forgetting.mean()),
        "slot_entropy": float(entropy.mean()),
        "dead_slots": float((most < DEAD / M).float().mean()),
    }


def _mean_read(q: Tensor, k: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """Mean of softmax(K̃_t q_t) over tokens [HQ, M], of q [T, HQ, K], k [T, H, K], g and s [T, H, M]."""
    T, H, M = g.shape
    slots = k.new_zeros(H, M, k.shape[2])
    total = q.new_zeros(H, q.shape[1] // H, M)
    for t in range(T):
        slots = g[t].exp()[..., None] * slots + s[t][..., None] * k[t][:, None]
        total += torch.softmax(q[t].view(H, -1, q.shape[2]) @ slots.transpose(1, 2), dim=-1)
    return (total / T).flatten(0, 1)
