"""Values first: no model is timed before a small one of its kind has been compared with float64.

A model of two blocks, with the heads and the width of the size that is timed, computes logits, the loss and the
gradients of all parameters of a few short rows, on the device, in the precision and in the variant that are timed. The
judge has the same weights and computes in float64 on the CPU, for GSA with this package's model whoever made the
weights. Allowed is twice what the judge itself loses in the precision that is timed, and `ROUNDINGS` halves of a unit
of it in the last place: its operator computes in float32, where a kernel has products of 16 bits.
Of three draws of tokens the middle distance counts: the gradient of a gate is a small difference of large numbers, and
in 16 bits its distance varies by a third from draw to draw.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .gate import Errors, Tensors, compare
from .measurements import open_device
from .train_models import SIZES, TRAINED, Trained
from .train_steps import Job, autocast, built, first_step, in_format, weight_format

LAYERS, INTERMEDIATE, VOCABULARY = 2, 256, 512
ROWS, LENGTH, DRAWS = 2, 130, 3
ROUNDINGS = 12
EPS = 1e-5
"""The only ε that FLA's output norm computes with, whatever it is told."""


def measure_errors(device: str, job: Job) -> dict[str, Any]:
    """{"problem": None or "wrong: …", "errors": {result: (distance, allowed)}}; of who tunes also its first step."""
    place = open_device(device)
    if reason := TRAINED[job.implementation].reason_against(place):
        return {"problem": f"not run: {reason}"}
    # What tunes itself does so at the size that is timed, not at this small one.
    tuned = first_step(job, place)[1] if TRAINED[job.implementation].tunes else {}
    errors = errors_of(job, place)
    return tuned | {"problem": f"wrong: {errors.problem}" if errors.problem else None, "errors": errors.found}


def errors_of(job: Job, device: torch.device) -> Errors:
    """The distances of logits, loss and gradients from float64."""
    who = TRAINED[job.implementation]
    size = replace(SIZES[job.size], layers=LAYERS, intermediate=INTERMEDIATE, vocabulary=VOCABULARY)
    model = built(who, size, job, device, norm_eps=EPS)
    judge = TRAINED["ours"] if who.mixer == "gsa" else who

    def twin(dtype: torch.dtype) -> nn.Module:
        same = in_format(who.twin(size, norm_eps=EPS).train(), dtype)
        same.load_state_dict(model.state_dict())
        return same

    exact, plain = twin(torch.float64), twin(weight_format(job.precision))
    draws = []
    for seed in range(DRAWS):
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=random)
        found = _results(who, model, tokens.to(device), job.precision, who.gradients_judged, **who.small_loss)
        wanted = _results(judge, exact, tokens, "fp64", who.gradients_judged)
        usual = _results(judge, plain, tokens, job.precision, who.gradients_judged)
        draws.append(compare({name: x.cpu() for name, x in found.items()}, wanted, usual, units=ROUNDINGS).found)
    return Errors({name: sorted(draw[name] for draw in draws)[DRAWS // 2] for name in draws[0]})


def _results(
    who: Trained, model: nn.Module, tokens: Tensor, precision: str, with_gradients: bool, **options: Any
) -> Tensors:
    with autocast(precision, tokens.device):
        # With gradients, as the loss: torch.compile makes other code without.
        logits = who.logits(model, tokens).detach()
        loss = who.loss(model, who.forward(model, tokens), tokens, **options)
    # The loss may be no more exact than the logits it comes of.
    found: Tensors = {"logits": logits, "loss": loss.detach().to(logits.dtype)}
    if with_gradients:
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found |= {f"d{name}": g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    return found
