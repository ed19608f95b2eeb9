"""What this machine and its packages are, for reports and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from probkit._version import __version__

__all__ = ["PACKAGES", "environment"]

#: Distributions whose versions are worth knowing.
PACKAGES = (
    "torch",
    "pyro-ppl",
    "gpytorch",
    "botorch",
    "arviz",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


def environment() -> dict[str, str]:
    """Versions and devices, in the order in which they are best read.

    Returns:
        Name to value: probkit, Python, the platform, processors, threads of torch, CUDA
        devices, and the versions of the packages of :data:`PACKAGES` that are installed.

    Example:
        >>> facts = environment()
        >>> list(facts)[:2]
        ['probkit', 'Python']
    """
    import torch

    facts = {
        "probkit": __version__,
        "Python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CUDA devices": _cuda_devices(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def _cuda_devices() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
