"""What every result file says of itself: device, versions, commit, date, command."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flash_gsa import __version__
from flash_gsa.errors import UsageError

PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention")


def about(command: str, device: str | None = None, known_commit: str | None = None) -> dict[str, Any]:
    """The record of a run of `command` on this machine, now.

    Args:
        command: what was typed.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU if there is one.
        known_commit: the commit of the code, where git cannot say it: outside a checkout, or in one that differs from
            its own commit.

    Raises:
        UsageError: `known_commit` is given, but the code is at another commit without differing from it.
    """
    import torch

    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    found = commit()
    told = found
    if known_commit and not (found or "").startswith(known_commit):
        if found and not found.endswith("-dirty"):
            raise UsageError(
                f"the code is at commit {found}, not at {known_commit!r}; --commit and FLASH_GSA_COMMIT are for copies "
                "without git"
            )
        told = known_commit
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": told,
        **({"checkout": found} if told != found and found else {}),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **versions()},
    }


def write(result: dict[str, Any], path: Path) -> None:
    """The result as a JSON file, whole or not at all.

    Raises:
        UsageError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise UsageError(f"the result cannot be written to {path}: {error.strerror}") from None


def commit() -> str | None:
    """The commit the code is at, with "-dirty" if it differs from it; None outside a checkout of its own."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    # An installed package may lie inside the checkout of something else.
    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12") or None


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed; our own is that of the running code."""
    found = {"flash-gsa": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
