"""Recall measured on synthetic batches: how often the most likely token is the right one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flash_gsa.data import NOT_SCORED, Batch


def mqar_accuracy(
    model: Any, batches: Iterable[Batch], *, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> float:
    """Share of scored positions (targets ≠ −100, in MQAR the queries) at which argmax of the logits is the target.

    Args:
        model: a `GSAForCausalLM`, on the device it shall run on; measured in evaluation mode.
        batches: `input_ids` and `targets` [B, T] each.
        autocast: makes the context of each pass.

    Raises:
        ValueError: no position is scored.
    """
    right, scored = count_right(model, batches, autocast=autocast)
    if not scored:
        raise ValueError("no position of these batches is scored (all targets are -100); expected MQAR batches")
    return right / scored


@torch.no_grad()
def count_right(
    model: Any, batches: Iterable[Batch], *, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[int, int]:
    """Scored positions at which argmax of the logits is the target, and all scored ones; see `mqar_accuracy`."""
    was_training = model.training
    model.eval()
    right = scored = 0
    try:
        for batch in batches:
            device = model.lm_head.weight.device
            at = (batch.targets != NOT_SCORED).to(device)
            with autocast():
                hidden = model.model(batch.input_ids.to(device), cu_seqlens=batch.cu_seqlens).last_hidden_state
                guesses = model.lm_head(hidden[at]).argmax(-1)
            right += int((guesses == batch.targets.to(device)[at]).sum())
            scored += int(at.sum())
    finally:
        model.train(was_training)
    return right, scored
