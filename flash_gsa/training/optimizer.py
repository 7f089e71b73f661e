"""AdamW with decoupled weight decay, and its learning rate as a function of the step."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flash_gsa.training.recipe import OptimizerSection


def learning_rate(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int | None) -> float:
    """Learning rate of step `step` (counted from 1): linear warm-up, then half a cosine.

        step <= w:  peak · step / w
        step >  w:  floor + (peak - floor) · (1 + cos(π · (step - w) / (total - w))) / 2

    with w = `warmup_steps`. It is `peak` at step w and `floor` at step `total_steps` and after. With
    `total_steps=None` (the length of the run is not known yet) it stays at `peak` after warm-up.
    Source: section 4 of the GSA paper (arXiv 2409.07146).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if total_steps is None:
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: which tensors are pulled towards zero, and which are not.

    Matrices and convolution filters decay. Vectors (norm weights, biases) do not, because shrinking a
    gain or an offset is no regularisation; nor do embedding tables, whose rows of rare tokens would only
    fade between their occurrences. A matrix shared by the embedding and the output counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    keeps = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": keeps, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over `decay_groups(model)`: one fused kernel a step, on CPU and on GPU."""
    return torch.optim.AdamW(
        decay_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's state as tensors named `optimizer/<state>/<parameter>` (`optimizer/exp_avg/…`)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"optimizer/{key}/{names[id(p)]}": value for p, state in optimizer.state.items() for key, value in state.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, read: Callable[[str, int, int | None], torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave, on the parameters' devices and in their dtypes.

    Args:
        read: `read(name, start, stop)` gives those rows of a saved tensor, on the CPU.
    """
    for name, p in model.named_parameters():
        state = {}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p, requires_grad=False)
            copy_rows(state[key], partial(read, f"optimizer/{key}/{name}"))
        state["step"] = read(f"optimizer/step/{name}", 0, None).to(p.device)
        optimizer.state[p] = state


def copy_rows(target: torch.Tensor, read: Callable[[int, int | None], torch.Tensor]) -> None:
    """Fills a tensor, or this process's rows of one that is sharded, from `read(start, stop)`."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            start, count = own_rows(target)
            if count:
                target.to_local().copy_(read(start, start + count))
        else:
            target.copy_(read(0, None))


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows of a sharded tensor that this process holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]
