"""AdamW with decoupled weight decay, and its learning rate as a function of the step."""

import math
from collections.abc import Mapping

import torch
from torch import nn

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


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave; names of other kinds in `tensors` are left alone."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, key, parameter = name.split("/", 2)
            states.setdefault(parameter, {})[key] = value
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {i: states[name] for i, name in enumerate(order) if name in states}, "param_groups": groups}
    )
