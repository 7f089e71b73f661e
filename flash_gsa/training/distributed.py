"""Several processes that take each step together, one device each; `torchrun` or `accelerate launch` starts them.

Every process computes its own rows of a step. Losses are shares of the step's mean over all scored tokens, so what the
engines here compute of gradients is their sum over processes.

Accelerate starts the processes' communication, under its own launcher, torchrun and MPI. What wraps the model is
torch's own (here) and DeepSpeed's (`zero.py`), called directly: Accelerate leaves a model on CPUs unsharded, so that
sharding could be tested on GPUs only, and takes DeepSpeed's step inside the backward, where a gradient that is not
finite could no longer be kept from the weights.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flash_gsa.data import Batch
from flash_gsa.errors import UsageError
from flash_gsa.models import GSAForCausalLM
from flash_gsa.parallel import apply_context_parallel, stretch
from flash_gsa.training.engine import Engine, Inside, Outcome, Piece
from flash_gsa.training.optimizer import build_optimizer, own_rows
from flash_gsa.training.recipe import EngineSection, OptimizerSection

_HOW = "torchrun --nproc-per-node N -m flash_gsa train …"
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Distributed(Engine):
    """What engines of several processes share: how they start, talk, and decide together.

    Raises:
        UsageError: the processes were not started as `section` needs them, or do not find each other.
    """

    def __init__(self, device: str, precision: str, section: EngineSection) -> None:
        _check_start(section.kind, device)
        if torch.cuda.is_available() and device in ("auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        super().__init__(device, precision, section)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._started = not dist.is_initialized()
        _start(self.device, section.timeout)
        self.rank, self.ranks, self.context = dist.get_rank(), dist.get_world_size(), section.context
        section.shards(self.ranks)  # or says why not

    def prepare(self, model: GSAForCausalLM, settings: OptimizerSection) -> None:
        self.model = self.placed(model)
        if self.context > 1:
            mesh = init_device_mesh(
                self.device.type, (self.ranks // self.context, self.context), mesh_dim_names=("rows", "context")
            )
            self._cut = apply_context_parallel(self.model, mesh.get_group("context"))
        self.inside = self.wrapped(Inside(self.model))
        self.optimizer = build_optimizer(self.model, settings)

    def wrapped(self, inside: nn.Module) -> nn.Module:
        """The module that this engine gathers weights and gradients around."""
        raise NotImplementedError

    def score(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._cut.suspended() if self.context > 1 else nullcontext():
            return super().score(function, *arguments)

    def stretch(self, batch: Batch) -> Batch:
        if self.context == 1:
            return batch
        return stretch(batch, self.rank % self.context, self.context)

    def total(self, count: int) -> float | Tensor:
        total = torch.tensor(count / self.context, device=self.device)  # all of a group counted the same rows
        dist.all_reduce(total)
        return total

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.ranks).backward()  # what follows takes the mean over processes

    def update(self, losses: list[Tensor], rate: float, clip: float, *, seconds: float, stop: bool) -> Outcome:
        norm = self.clip(clip)
        own = torch.stack(losses).double()
        all_of_them = torch.cat([own.sum()[None], own.new_tensor([seconds if self.is_main else 0.0, float(stop)])])
        dist.all_reduce(all_of_them)
        *parts, loss, told, wishes, length = torch.cat([own, all_of_them, norm.to(own)[None]]).tolist()
        outcome = Outcome(parts, loss, length, told, wishes > 0)
        return self._applied(outcome, rate)

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if self._started and dist.is_initialized():
            dist.destroy_process_group()

    def describe(self) -> str:
        cut = f", rows cut over {self.context}" if self.context > 1 else ""
        return f"{self.ranks} × {super().describe()}, {self.section.kind}{cut}"


class DataParallel(Distributed):
    """Whole copies everywhere (DDP); gradients are summed while the backward goes on."""

    def wrapped(self, inside: nn.Module) -> nn.Module:
        return DistributedDataParallel(inside, gradient_as_bucket_view=True)

    def accumulate(self, function: Callable[..., Tensor], *arguments: Any, last: bool) -> Tensor:
        with nullcontext() if last else self.inside.no_sync():
            return super().accumulate(function, *arguments, last=last)


class Sharded(Distributed):
    """Weights, gradients and moments in rows over processes (FSDP2); with `replicas`, in several such groups (HSDP).

    A block is gathered whole when it is computed, and so is the embedding; the output matrix stays gathered from the
    forward to the backward. Gradients are summed over the processes after every micro-batch, so that none is kept
    whole. With `reshard_after: step` everything is gathered once a step, and summed once.
    """

    sharded = True

    def wrapped(self, inside: nn.Module) -> Any:
        replicas = self.section.replicas
        shape = (self.ranks,) if replicas is None else (replicas, self.ranks // replicas)
        names = ("shard",) if replicas is None else ("replica", "shard")
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        computed = torch.bfloat16 if self.precision == "bf16" else None
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32),
        }
        if self.section.reshard_after == "step":
            options["reshard_after_forward"] = False
        body = self.model.model
        for block in body.layers:
            fully_shard(block, **options)
        if body.embeddings.weight is not self.model.lm_head.weight:
            fully_shard(body.embeddings, **options)
        return fully_shard(inside, **options)  # what is left: the last norm, the output matrix

    def accumulate(self, function: Callable[..., Tensor], *arguments: Any, last: bool) -> Tensor:
        self.inside.set_requires_all_reduce(last)  # between groups of HSDP
        if self.section.reshard_after == "step":
            self.inside.set_reshard_after_backward(last)
            self.inside.set_requires_gradient_sync(last)
        return super().accumulate(function, *arguments, last=last)

    def score(self, function: Callable[..., Any], *arguments: Any) -> Any:
        found = super().score(function, *arguments)
        for module in self.inside.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a backward would have let go of
        return found

    def clip(self, max_norm: float) -> Tensor:
        norm = super().clip(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def pieces(self) -> dict[str, Piece]:
        whole = super().pieces()
        if self.section.replicas is not None and self.mesh.get_local_rank("replica") > 0:
            return {}
        found = {}
        for name, piece in whole.items():
            if not isinstance(piece.tensor, DTensor):
                if self.is_main:
                    found[name] = piece
                continue
            start, count = own_rows(piece.tensor)
            if count:
                found[name] = replace(piece, tensor=piece.tensor.to_local(), start=start, rows=piece.tensor.shape[0])
        return found


def _check_start(kind: str, device: str) -> None:
    if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        raise UsageError(
            f"engine.kind={kind} needs processes that a launcher has started: {_HOW} "
            "(or accelerate launch --multi-gpu). For one process without a launcher set engine.kind=single"
        )
    if not dist.is_initialized():
        if missing := [name for name in _LAUNCHER if name not in os.environ]:
            raise UsageError(f"{', '.join(missing)} is not in the environment, where a launcher puts it: {_HOW}")
        rank, ranks = (os.environ[name] for name in _LAUNCHER[:2])
        if not (rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks)):
            raise UsageError(
                f"RANK={rank} with WORLD_SIZE={ranks}: expected whole numbers, RANK from 0 below WORLD_SIZE"
            )
    if ":" in device:
        raise UsageError(f"device={device} is one device, and engine.kind={kind} has several. Use device=cuda or auto")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
    if 0 < count < local:
        raise UsageError(
            f"{local} processes were started on this machine, which has {count} GPU(s), and each needs its own. "
            f"Start {count} (--nproc-per-node {count}), or set device=cpu"
        )


def _start(device: torch.device, timeout: int) -> None:
    """Finds the other processes, at the address that the launcher gave."""
    if dist.is_initialized():
        return
    from accelerate import PartialState

    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        PartialState(cpu=device.type == "cpu", timeout=timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError, ValueError) as error:
        rank, ranks, address, port = (os.environ[name] for name in _LAUNCHER)
        reason = str(error).strip().splitlines()[0][:200]
        raise UsageError(
            f"Process {rank} of {ranks} did not find the others at {address}:{port} within engine.timeout={timeout} s "
            f"({reason}). Check that the process of rank 0 runs, that its address and port can be reached from here, "
            "and that all were given the same"
        ) from error
