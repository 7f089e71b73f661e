"""Small models of every recurrent mixer, whole in one process or in stretches over several."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from flash_gsa import GSAConfig, GSAForCausalLM
from flash_gsa.data import Batch
from flash_gsa.models.loss import next_token_loss
from flash_gsa.parallel import apply_context_parallel, stretch

VOCABULARY, NOT_SCORED = 50, -100


@dataclass(frozen=True)
class ModelCase:
    """tokens: of all ranks, a row; lengths: of packed sequences; near: how far results may be from one process's, as a
    share of their norm (GSA's and ABC's gates are float32 also in a model that is float64); compiled: torch.compile's
    backend, for each block."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 36
    B: int = 1
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    near: float = 1e-10
    checkpointing: bool = False
    compiled: str | None = None
    autocast: bool = False


CONV = {"use_short_conv": True, "conv_size": 4}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
ONE_LAYER = {"num_hidden_layers": 1}
F_PROJ = {"near": 1e-7}

MODELS = {
    2: [
        ModelCase("gsa, rows", CONV | GROUPED, B=2, **F_PROJ),
        ModelCase("gsa, packed", CONV | GROUPED, lengths=(3, 20, 13), **F_PROJ),
        ModelCase("gsa, longer", CONV | GROUPED, tokens=144, lengths=(30, 80, 34), **F_PROJ),
        ModelCase("gsa, none across", CONV, lengths=(18, 17, 1), **F_PROJ),
        ModelCase("gsa, float32", CONV | GROUPED, lengths=(5, 12, 19), dtype=torch.float32, near=1e-5),
        ModelCase("gsa, states again", CONV | {"states": "recompute"}, lengths=(3, 20, 13), **F_PROJ),
        ModelCase("pooled keys", {"gate_source": "pooled_keys"}, lengths=(7, 29), **F_PROJ),
        ModelCase("data-independent gates", {"gating": "data_independent"} | CONV, lengths=(11, 25), near=1e-5),
        ModelCase("abc, rows", {"gating": "abc"}, B=2, near=1e-5),
        ModelCase("abc, packed", {"gating": "abc"} | CONV, lengths=(4, 1, 24, 7), near=1e-5),
        ModelCase("gla, rows", {"token_mixer": "gla"} | GROUPED, B=2),
        ModelCase("gla, packed", {"token_mixer": "gla"} | CONV, lengths=(9, 20, 7)),
        ModelCase("hgrn2", {"token_mixer": "hgrn2"} | CONV, lengths=(16, 20)),
        ModelCase("retnet, rows", {"token_mixer": "retnet"} | CONV, B=2),
        ModelCase("retnet, packed", {"token_mixer": "retnet"} | GROUPED, lengths=(15, 21)),
        ModelCase("checkpointed", {"gating": "abc"} | CONV, lengths=(4, 25, 7), checkpointing=True, near=1e-5),
        ModelCase("compiled", CONV | ONE_LAYER, lengths=(4, 25, 7), compiled="eager", checkpointing=True, **F_PROJ),
    ],
    3: [
        ModelCase("gsa, one across three", CONV | GROUPED, lengths=(5, 29, 2), **F_PROJ),
        ModelCase("gsa, many", CONV, lengths=(3, 9, 1, 0, 10, 2, 11), **F_PROJ),
        ModelCase("abc, one across three", {"gating": "abc"} | CONV, lengths=(5, 29, 2), near=1e-5),
        ModelCase("hgrn2, rows", {"token_mixer": "hgrn2"}, B=2),
        ModelCase("retnet, one across three", {"token_mixer": "retnet"} | CONV, lengths=(5, 29, 2)),
        ModelCase("gla, checkpointed", {"token_mixer": "gla"} | CONV, lengths=(36,), checkpointing=True),
    ],
}

# Each rank on a GPU of its own; as in training: float32 weights, products in bfloat16.
WIDE = {"hidden_size": 128, "num_heads": 2, "num_slots": 32}
ON_GPUS = {"tokens": 400, "dtype": torch.float32, "autocast": True, "lengths": (50, 300, 50)}
MODELS_ON_GPUS = {
    2: [
        ModelCase("gsa on GPUs", WIDE | CONV, **ON_GPUS),
        ModelCase("gsa on GPUs, rows", WIDE | CONV, **ON_GPUS | {"lengths": None, "B": 2}),
        ModelCase("abc on GPUs, checkpointed", WIDE | {"gating": "abc"}, checkpointing=True, **ON_GPUS),
        ModelCase("gla on GPUs", WIDE | {"token_mixer": "gla"} | CONV, **ON_GPUS),
        ModelCase("gsa on GPUs, compiled", WIDE | CONV, compiled="aot_eager", **ON_GPUS),
    ],
    4: [
        ModelCase("gsa on four GPUs", WIDE | CONV, **ON_GPUS),
        ModelCase("abc on four GPUs, rows", WIDE | {"gating": "abc"}, **ON_GPUS | {"lengths": None, "B": 2}),
    ],
}


def model_of(case: ModelCase) -> GSAForCausalLM:
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "num_slots": 5, "intermediate_size": 24}
    config = GSAConfig(vocab_size=VOCABULARY, **sizes | case.settings)
    model = GSAForCausalLM(config).to(case.dtype).train()
    with torch.no_grad():  # far from where everything is linear
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def batch_of(case: ModelCase) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(VOCABULARY, (case.B, case.tokens), generator=generator) for _ in range(2))
    targets[:, ::5] = NOT_SCORED
    cu_seqlens = None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0).int()
    return Batch(ids, targets, cu_seqlens)


def results(case: ModelCase, model: GSAForCausalLM, batch: Batch, scored: int) -> dict[str, torch.Tensor]:
    """Hidden states, loss and gradients of the tokens in `batch`."""
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.compiled:
        for block in model.model.layers:
            block.compile(backend=case.compiled)
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens).last_hidden_state
        loss = next_token_loss(hidden, model.lm_head.weight, batch.targets, scored=scored)
    loss.backward()
    gradients = {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"hidden": hidden.detach(), "loss": loss.detach(), **gradients}


@contextmanager
def counted():
    """How many numbers this process sends in each exchange within, forward and backward."""
    sent: list[int] = []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def gather(parts, x, **options):
        sent.append(x.numel())
        return all_gather(parts, x, **options)

    def reduce(x, **options):
        sent.append(x.numel())
        return all_reduce(x, **options)

    with patch.object(dist, "all_gather", gather), patch.object(dist, "all_reduce", reduce):
        yield sent


def whole(case: ModelCase, device: str | torch.device = "cpu", **changes: Any) -> dict[str, torch.Tensor]:
    """What one process finds."""
    case = replace(case, compiled=None, checkpointing=False, **changes)
    batch = batch_of(case)
    scored = int((batch.targets != NOT_SCORED).sum())
    return {name: x.cpu() for name, x in results(case, model_of(case).to(device), batch.to(device), scored).items()}


def mine(case: ModelCase, rank: int, ranks: int, group, device: torch.device) -> dict[str, torch.Tensor]:
    """What this process finds: hidden states of its tokens; loss and gradients summed over all."""
    batch = batch_of(case)
    scored = int((batch.targets != NOT_SCORED).sum())
    model = model_of(case).to(device)
    parallel = apply_context_parallel(model, group)
    with counted() as sent:
        found = results(case, model, stretch(batch, rank, ranks).to(device), scored)
    for name, x in found.items():
        if name != "hidden":
            dist.all_reduce(x, group=group)
    found["sent"] = torch.tensor(sent)
    if rank == 0:  # the others take no part: it would wait for them in an exchange
        with parallel.suspended(), torch.no_grad():
            ids = batch.input_ids.to(device)
            found["suspended"] = model.model(ids, cu_seqlens=batch.cu_seqlens).last_hidden_state
        if device.type == "cuda":
            found |= {f"alone: {name}": x for name, x in whole(case, device).items()}
    return {name: x.cpu() for name, x in found.items()}
