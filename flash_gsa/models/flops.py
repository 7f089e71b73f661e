"""How much arithmetic a model does for a token, for throughput in FLOP/s and as a share of what a device can.

Counted are matrix products and convolutions, a multiplication and an addition as 2, as the model is defined:

    linear maps            2 · in · out, the output matrix among them, embeddings not
    short convolutions     2 · width · channels
    gated slot attention   2 · M · (K + V) a key/value head to write both states, and as much a query head to read them
    gated linear attention 2 · K · V a key/value head to write its state, and as much a query head to read it
    softmax attention      2 · 2 · D a query head and token in sight; half the length on average

Norms, activations, gates and rotations are left out. A training step is three times a forward: each product has two
more in the backward. What a chunkwise operator computes beyond the recurrence, or checkpointing again, is no work of
the model and does not count.
"""

from torch import nn

from flash_gsa.layers.convolution import ShortConvolution


def forward_flops(model: nn.Module, length: int) -> float:
    """FLOPs a token of a forward over sequences of `length` tokens, on average over their positions."""
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += 2 * module.in_features * module.out_features
        elif isinstance(module, ShortConvolution):
            total += 2 * module.weight.numel()
        elif (mixing := getattr(module, "mixing_flops", None)) is not None:
            total += mixing(length)
    return total


def training_flops(model: nn.Module, length: int) -> float:
    """FLOPs a token of a training step: forward and backward."""
    return 3 * forward_flops(model, length)
