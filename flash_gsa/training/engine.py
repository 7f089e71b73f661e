"""Where and in what precision a step runs: on one device here; on several in `distributed.py` and `zero.py`."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flash_gsa.data import Batch
from flash_gsa.errors import UsageError
from flash_gsa.models import GSAForCausalLM
from flash_gsa.training.optimizer import (
    build_optimizer,
    copy_rows,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from flash_gsa.training.recipe import EngineSection, OptimizerSection

# Dense bfloat16 FLOP/s of the tensor cores, by what NVIDIA's names contain; the first that fits holds. From its data
# sheets.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),  # GH200, too
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


@dataclass(frozen=True)
class Outcome:
    """What a step came to; the same in every process.

    Attributes:
        parts: loss of each of this process's micro-batches, its share of `loss`.
        loss, norm: of the step, and of its gradient before clipping. Weights were changed if both are finite.
        seconds: what the main process gave; and whether any process gave a wish to stop.
    """

    parts: list[float]
    loss: float
    norm: float
    seconds: float
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Piece:
    """Rows `start` and following of a tensor with `rows` rows in all; `rows` is None for one that is whole."""

    tensor: Tensor
    start: int = 0
    rows: int | None = None


Read = Callable[[str, int, int | None], Tensor]
"""`read(name, start, stop)`: rows of a saved tensor, on the CPU; all of it with `stop=None`."""


class Inside(nn.Module):
    """A model whose forward is any function of it.

    What shards a model gathers weights, and awaits gradients, at calls of the module it was given. A loss in pieces
    from `lm_head.weight`, or a score of many passes, is no `model.forward`, and still has to happen inside such a call.
    """

    def __init__(self, model: GSAForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


class Engine:
    """One process on one device; `Distributed` and those derived from it have several.

    With precision "bf16" weights, gradients and optimiser moments are fp32 and products bf16; with "pure_bf16" all
    are bf16. A model has to be given to `prepare` before steps are taken.

    Attributes:
        device, precision: what `device` and `precision` came to.
        rank, ranks: this process's number, and how many there are.
        sharded: a checkpoint is written by every process, each its rows of every tensor.
    """

    rank, ranks, context = 0, 1, 1
    sharded = False

    def __init__(self, device: str = "auto", precision: str = "auto", section: EngineSection | None = None) -> None:
        """Raises UsageError if the device is not there or cannot compute in this precision."""
        self.device = _device(device)
        self.precision = _precision(precision, self.device)
        self.section = section or EngineSection()

    @property
    def is_main(self) -> bool:
        """Whether this process prints, draws and writes what is written once."""
        return self.rank == 0

    def prepare(self, model: GSAForCausalLM, settings: OptimizerSection) -> None:
        """Takes a model on the CPU, fp32, the same in every process; makes what `run` and `update` need of it."""
        self.model = self.placed(model)
        self.inside: Any = Inside(self.model)
        self.optimizer: Any = build_optimizer(self.model, settings)

    def placed(self, model: GSAForCausalLM) -> GSAForCausalLM:
        """The model on this device, in what its weights are kept in, with checkpointing and compilation."""
        model.to(self.device, self.weights_dtype).train()  # type: ignore[arg-type]
        checkpoint_blocks(model, self.section.checkpointing)
        if self.section.compile:
            for block in model.model.layers:
                block.compile()
        return model

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "pure_bf16" else torch.float32

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(model, *arguments)` with the model's weights at hand, under autocast."""
        with self.autocast():
            return self.inside(function, *arguments)

    @torch.no_grad()
    def score(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`run` without gradients. Every process calls it, with as many passes of the model."""
        return self.run(function, *arguments)

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes: bf16 matrix products, or nothing to change."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def accumulate(self, function: Callable[..., Tensor], *arguments: Any, last: bool) -> Tensor:
        """Adds the gradient of `run(function, …)`, this process's share of a step's loss; returns that share.

        Args:
            last: of this step; the processes may now add their gradients up.
        """
        loss = self.run(function, *arguments)
        self.backward(loss, last)
        return loss.detach()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch."""
        loss.backward()

    def update(self, losses: list[Tensor], rate: float, clip: float, *, seconds: float, stop: bool) -> Outcome:
        """Changes the weights by the gradients, if those and the losses are finite, and drops the gradients.

        Args:
            losses: what `accumulate` gave.
            rate: learning rate.
            clip: gradients are scaled so that their joint L2 norm is at most that.
            seconds, stop: see `Outcome`.
        """
        norm = self.clip(clip)
        parts = torch.stack([*losses, norm.to(losses[0])])
        # Reading them waits for the device, once a step; in exchange a bad gradient never reaches the weights.
        *own, length = parts.tolist()
        return self._applied(Outcome(own, math.fsum(own), length, seconds, stop), rate)

    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def _applied(self, outcome: Outcome, rate: float) -> Outcome:
        """Takes the optimiser's step if it may be taken; what came of it."""
        if outcome.finite:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def stretch(self, batch: Batch) -> Batch:
        """What of a micro-batch this process computes: all of it, or its part where rows are cut over processes."""
        return batch

    def total(self, count: int) -> float | Tensor:
        """The sum of `count` over the processes that compute different rows, without waiting for it."""
        return float(count)

    def pieces(self) -> dict[str, Piece]:
        """What this process writes into a checkpoint: `model/<weight>` and `optimizer/<state>/<weight>`."""
        found = {f"model/{name}": Piece(p.detach()) for name, p in self.model.named_parameters()}
        return found | {name: Piece(t) for name, t in optimizer_tensors(self.optimizer, self.model).items()}

    def load(self, read: Read) -> None:
        """Puts weights and optimiser back as `pieces` of any engine, on any number of processes, were saved."""
        for name, p in self.model.named_parameters():
            copy_rows(p, partial(read, f"model/{name}"))
        load_optimizer(self.optimizer, self.model, read)

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, by rank."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The picklable `value` of the main process."""
        return value

    def told_by_main(self, function: Callable[[], Any]) -> Any:
        """`function()` of the main process, which alone calls it; picklable.

        Raises:
            UsageError: what it raises there is raised by every process.
        """
        value = mistake = None
        if self.is_main:
            try:
                value = function()
            except UsageError as error:
                mistake = error
        value, said = self.broadcast((value, None if mistake is None else (str(mistake), mistake.status)))
        if said is not None:
            mistake = mistake or UsageError(said[0])
            mistake.everywhere, mistake.status = True, said[1]
            raise mistake
        return value

    def barrier(self) -> None:
        """Waits until every process is here."""

    def close(self) -> None:
        """Lets the other processes go."""

    def random_state(self) -> dict[str, Tensor]:
        """State of torch's generators, uint8 tensors by device type."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_random_state(self, states: dict[str, Tensor]) -> None:
        """Puts back what `random_state` gave; a generator of a device not used here is left out."""
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def peak_memory(self) -> int:
        """Most bytes held so far: allocated on the GPU, or resident in this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident_bytes()

    def device_memory(self) -> int | None:
        """Bytes of a GPU; None on a CPU, whose memory is shared with others."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    def peak_flops(self) -> float | None:
        """What a device can do at best in this precision, FLOP/s; None where that is not known."""
        if self.device.type != "cuda" or self.precision == "fp32":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in PEAK_FLOPS if part in name), None)

    def describe(self) -> str:
        """For people: `cpu (2 threads), fp32`."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
        if self.device.type == "cpu":
            return f"cpu ({torch.get_num_threads()} threads), {self.precision}"
        return f"{self.device}, {self.precision}"


def checkpoint_blocks(model: GSAForCausalLM, policy: str | int) -> None:
    """Makes blocks keep only their input, and compute again in the backward: "none", "all", or every n-th."""
    if policy == "none":
        return
    # transformers is renaming it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if isinstance(policy, int):
        for index, block in enumerate(model.model.layers):
            block.gradient_checkpointing = index % policy == policy - 1


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows has no such call
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not a device: expected auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"device={name} is not there: torch {torch.__version__} sees {count} CUDA device(s) on this "
                "machine. Use device=auto to take what there is."
            )
    elif device.type != "cpu":
        raise UsageError(f"device={name!r} is not supported: expected auto, cpu, cuda or cuda:0")
    return device


def _precision(name: str, device: torch.device) -> str:
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        where = torch.cuda.get_device_name(device)
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        where = "this CPU (no AVX512-BF16, no AMX)"
    if name == "auto":
        return "bf16" if supported and device.type == "cuda" else "fp32"
    if name in ("bf16", "pure_bf16") and not supported:
        raise UsageError(f"precision={name} would be emulated, and slow, on {where}. Use precision=fp32, or auto.")
    return name
