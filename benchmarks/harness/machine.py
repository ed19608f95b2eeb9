"""What a result says about the machine: its kind, never its name or its folders."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.results import Machine

__all__ = ["commit", "cpu_model", "find_gpu", "this_machine"]

_ASK_GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
_ASK_DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def cpu_model() -> str:
    """Return the processor's model name, or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_gpu(python: str = sys.executable) -> str | None:
    """Return the GPU's name as PyTorch gives it and its driver, or None; asks other processes."""
    reply = subprocess.run([python, "-c", _ASK_GPU], capture_output=True, text=True, check=False)
    name = reply.stdout.strip()
    return f"{name}{_driver()}" if name else None


def _driver() -> str:
    """The version of the driver, in words to add; nothing where nobody tells."""
    try:
        reply = subprocess.run(_ASK_DRIVER, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    versions = reply.stdout.split()
    return f", driver {versions[0]}" if reply.returncode == 0 and versions else ""


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    folder = Path(__file__).parent
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=folder
    )


def commit() -> str | None:
    """Return the short commit of the checkout, with ``+`` where files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if _git("diff", "--quiet", "HEAD").returncode else "")


def this_machine(gpu: str | None = None) -> Machine:
    """Return the description stored with a result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return Machine(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        memory_gib=round(memory, 1),
        system=f"{platform.system()} {platform.machine()}",
        gpu=gpu,
        load_1min=round(os.getloadavg()[0], 2),
    )
