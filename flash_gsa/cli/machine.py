"""What this machine can run: versions, devices, operator backends; the facts behind `flash-gsa doctor`."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

TYPICAL: dict[str, Any] = {"B": 1, "T": 2048, "HQ": 4, "H": 4, "K": 64, "V": 64, "M": 64}
"""The problem for which the choice of an operator backend is shown."""


def diagnose() -> dict[str, Any]:
    """Everything that is known, ready for JSON; `problems` is empty exactly when `usable`."""
    packages = _packages()
    problems = [f"{p['name']}: {p['verdict']}" for p in packages if p["problem"]]
    report: dict[str, Any] = {
        "flash_gsa": importlib.metadata.version("flash-gsa"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": packages,
        "triton": _version("triton"),
        "cuda": None,
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "devices": [],
    }
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported ({error}); install it: pip install torch")
    else:
        report["cuda"] = torch.version.cuda
        report["devices"] = _devices()
        for device in report["devices"]:
            if device["self_test"] != "passed":
                problems.append(f"the operator on {device['device']} {device['self_test']}")
    return report | {"problems": problems, "usable": not problems}


def _packages() -> list[dict[str, Any]]:
    from packaging.requirements import Requirement

    from flash_gsa._resources import shipped

    lines = shipped("constraints.txt").read_text().splitlines()
    tested = {name.lower(): v for name, _, v in (line.partition("==") for line in lines) if v}
    requirements = [Requirement(text) for text in importlib.metadata.requires("flash-gsa") or []]
    rows = []
    for requirement in requirements:
        extra = str(requirement.marker or "")
        if "dev" in extra:
            continue
        row: dict[str, Any] = {
            "name": requirement.name,
            "needed": str(requirement.specifier),
            "tested": tested.get(requirement.name.lower()),
            "problem": False,
        }
        row["installed"] = installed = _version(requirement.name)
        # A local label ("2.13.0+cpu") names a build of the same version.
        version = (installed or "").partition("+")[0]
        if installed is None:
            row["problem"] = not extra
            cure = f"pip install '{requirement.name}{requirement.specifier}'"
            row["verdict"] = f"not installed (optional: {cure})" if extra else f"missing: {cure}"
        elif not requirement.specifier.contains(version, prereleases=True):
            row["problem"] = True
            row["verdict"] = f"is {version}; flash-gsa needs {requirement.specifier}"
        else:
            row["verdict"] = "tested" if version == row["tested"] else "not the tested version"
        rows.append(row)
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    threads = torch.get_num_threads()
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _cpu_name(),
            "memory_gib": _ram_gib(),
            "about": f"{_usable_cores()} cores usable, {threads} threads of torch",
        }
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": about.name,
                "memory_gib": round(about.total_memory / 2**30, 1),
                "about": f"compute capability {about.major}.{about.minor}, "
                f"{about.multi_processor_count} multiprocessors",
            }
        )
    for device in devices:
        device["backends"] = _backends(device["device"])
        device["self_test"] = _self_test(device["device"])
    return devices


def _backends(device: str) -> list[dict[str, str]]:
    import torch

    from flash_gsa.ops.api import gated_slot_attention  # noqa: F401  (importing it registers the backends)
    from flash_gsa.ops.registry import Problem, explain

    kind = device.partition(":")[0]
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    reasons = explain(Problem(**TYPICAL, dtype=dtype, device=kind))
    chosen = next((name for name, reason in reasons if reason is None), None)
    return [
        {"name": name, "verdict": "chosen" if name == chosen else (reason or "can run; slower choice")}
        for name, reason in reasons
    ]


def _self_test(device: str) -> str:
    """ "passed", or what went wrong: values and gradients of a small problem against the fp64 reference."""
    import torch

    from flash_gsa.ops.api import gated_slot_attention

    make = torch.Generator().manual_seed(0)
    shape = (1, 96, 2, 16)
    q, k, v, g = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(4))
    g = torch.nn.functional.logsigmoid(g) / 8

    def outputs(place: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [x.to(place, dtype, copy=True).requires_grad_() for x in (q, k, v, g)]
        o, _ = gated_slot_attention(*inputs, backend=backend)
        o.square().sum().backward()
        return [x.detach().double().cpu() for x in (o, *(x.grad for x in inputs if x.grad is not None))]

    try:
        expected = outputs("cpu", torch.float64, "reference")
        got = outputs(device, torch.float32, "auto")
        # A GPU may multiply in TF32 (10 bits of mantissa); a wrong result is wrong in the first digits.
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
        return "passed" if worst < 1e-2 else f"differs from the reference by {worst:.1e} (relative)"
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"


def _usable_cores() -> int:
    # Containers often allow fewer cores than the machine has; not every system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
