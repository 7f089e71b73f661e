"""Where and in what precision a step runs. Another engine (several processes) replaces this one class."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from flash_gsa.errors import UsageError

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


class Engine:
    """One process on one device. Weights, gradients and optimiser moments are fp32 in every precision."""

    def __init__(self, device: str = "auto", precision: str = "auto") -> None:
        """Raises UsageError if the device is not there or cannot compute in this precision."""
        self.device = _device(device)
        self.precision = _precision(precision, self.device)

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes: bf16 matrix products, or nothing to change."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Updates the weights and drops the gradients."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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

    def peak_flops(self) -> float | None:
        """What the device can do at best in this precision, FLOP/s; None where that is not known."""
        if self.device.type != "cuda" or self.precision != "bf16":
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
    if name == "bf16" and not supported:
        raise UsageError(f"precision=bf16 would be emulated, and slow, on {where}. Use precision=fp32, or auto.")
    return name
