"""DeepSpeed's ZeRO: gradients and moments (stage 2), and weights (stage 3), in shards over processes.

DeepSpeed keeps its shards as flat parts of all weights together, which depend on the number of processes. A checkpoint
therefore holds every weight and moment whole, gathered one after the other and written by the main process; it can be
read by any engine.
"""

import importlib.util
import logging
import os

import torch
from torch import Tensor, nn

from flash_gsa.errors import UsageError
from flash_gsa.models import GSAForCausalLM
from flash_gsa.training.distributed import Distributed
from flash_gsa.training.engine import Inside, Outcome, Piece, Read
from flash_gsa.training.optimizer import build_optimizer, set_learning_rate
from flash_gsa.training.recipe import EngineSection, OptimizerSection

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Distributed):
    """ZeRO-2 or ZeRO-3. With precision "bf16" weights and their gradients are bf16, beside fp32 weights and moments.

    Raises:
        UsageError: DeepSpeed is not installed.
    """

    def __init__(self, device: str, precision: str, section: EngineSection) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError(
                f"engine.kind={section.kind} needs DeepSpeed, which is not installed: "
                "pip install flash-gsa[deepspeed]. engine.kind=fsdp2 shards the same without it"
            )
        super().__init__(device, precision, section)
        self.stage = int(section.kind[-1])

    def prepare(self, model: GSAForCausalLM, settings: OptimizerSection) -> None:
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPUs it would begin by compiling a C++ program for its sums, and needs a compiler for that; gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.model = self.placed(model)
        inside = Inside(self.model)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # it only reports with it
            "gradient_clipping": settings.clip,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.precision == "bf16", "check_grad_overflow": True},
            "steps_per_print": 10**9,
        }
        self.inside, *_ = deepspeed.initialize(
            model=inside,
            optimizer=build_optimizer(self.model, settings),
            config=config,
            dist_init_required=False,
        )
        self.optimizer = self.inside.optimizer
        self._states = self._make_states()
        if self.stage == 3:
            # It is read outside of its own module's forward, by the loss.
            deepspeed.zero.register_external_parameter(self.inside.module, self.model.lm_head.weight)

    def _make_states(self) -> list[dict[str, Tensor]]:
        """The moments, made now: DeepSpeed links them with the weights as soon as the first group has its own."""
        three = self.stage == 3
        parts = self.optimizer.fp32_partitioned_groups_flat if three else self.optimizer.single_partition_of_fp32_groups
        states = []
        for part in parts:
            moments = {key: torch.zeros_like(part, requires_grad=False) for key in _MOMENTS}
            states.append({"step": torch.zeros((), device=part.device), **moments})
            self.optimizer.optimizer.state[part] = states[-1]
        if not three:
            self.optimizer._lazy_init_hp_params_optimizer_state()
        return states

    def backward(self, loss: Tensor, last: bool) -> None:
        self.inside.set_gradient_accumulation_boundary(last)
        self.inside.backward(loss * self.ranks, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        # It clips in its own step, to the norm it was given at the start, and tells the norm after it.
        return torch.zeros((), device=self.device)

    def _applied(self, outcome: Outcome, rate: float) -> Outcome:
        if not outcome.finite:
            return outcome
        set_learning_rate(self.optimizer, rate)
        self.inside.step()  # leaves the weights as they are if the gradient is not finite
        norm = float(self.inside.get_global_grad_norm())
        return Outcome(outcome.parts, outcome.loss, norm, outcome.seconds, outcome.stop)

    def pieces(self) -> dict[str, Piece]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Piece] = {}
        step = self._states[0]["step"]
        for name, p in self.model.named_parameters():
            tensors = {f"model/{name}": safe_get_full_fp32_param(p)}
            for key in _MOMENTS:
                tensors[f"optimizer/{key}/{name}"] = safe_get_full_optimizer_state(p, key)
            if self.is_main:
                found |= {key: Piece(tensor.cpu()) for key, tensor in tensors.items()}
                found[f"optimizer/step/{name}"] = Piece(step.detach().cpu().clone())
        return found

    def load(self, read: Read) -> None:
        first = next(name for name, _ in self.model.named_parameters())
        for state in self._states:
            state["step"].copy_(read(f"optimizer/step/{first}", 0, None))
        for name, p in self.model.named_parameters():
            self._set(p, None, read(f"model/{name}", 0, None))
            for key in _MOMENTS:
                self._set(p, key, read(f"optimizer/{key}/{name}", 0, None))

    @torch.no_grad()
    def _set(self, p: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Gives a weight (key None) or a moment of it its whole value."""
        import deepspeed
        from deepspeed import utils

        value = value.to(self.device, torch.float32)
        if self.stage == 2:
            if key is None:
                utils.safe_set_full_fp32_param(p, value)
                p.copy_(value)
            else:
                utils.safe_set_full_optimizer_state(p, value, key)
            return
        count = p.ds_tensor.numel()  # type: ignore[attr-defined]  # of this process, padded to be equal everywhere
        flat = torch.nn.functional.pad(value.flatten(), (0, count * self.ranks - value.numel()))
        own = flat[self.rank * count : (self.rank + 1) * count]
        if key is None:
            utils.safe_set_local_fp32_param(p, own)
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(value)
        else:
            utils.safe_set_local_optimizer_state(p, own, key)
