"""The CUDA sources as one text, and the names of the kernels in it."""

from __future__ import annotations

import functools
from importlib import resources

import torch

__all__ = ["ACTIVATIONS", "FAMILIES", "name_of", "source", "type_name"]

ACTIVATIONS = {"relu": "ReLU", "erf": "Erf"}
"""Activations that the sources have, and what they call them."""

FAMILIES = {
    "rbf": "RBF",
    "matern12": "Matern12",
    "matern32": "Matern32",
    "matern52": "Matern52",
}
"""Stationary kernels that the sources have, and what they call them."""


@functools.cache
def source() -> str:
    """Both headers in one text, as the run-time compiler takes it.

    Example:
        >>> "network_matrix" in source()
        True
    """
    folder = resources.files("probkit.kernels.backends") / "cuda"
    entry, matrix = ((folder / name).read_text() for name in ("entry.cuh", "matrix.cuh"))
    return entry.replace("#pragma once", "") + matrix.replace("#pragma once", "").replace(
        '#include "entry.cuh"', ""
    )


def type_name(dtype: torch.dtype) -> str:
    """The C++ name of a floating dtype.

    Example:
        >>> type_name(torch.float64)
        'double'
    """
    return {torch.float64: "double", torch.float32: "float"}[dtype]


def name_of(kernel: str, dtype: torch.dtype, *options: str | bool) -> str:
    """One instance of a kernel template.

    Args:
        kernel: Name of the template.
        dtype: Precision.
        options: Further template arguments; activations and families by the names of this module.

    Example:
        >>> name_of("network_matrix", torch.float32, "relu", False, True)
        'probkit::network_matrix<float, probkit::ReLU, false, true>'
    """
    known = {**ACTIVATIONS, **FAMILIES}
    words = [
        str(option).lower() if isinstance(option, bool) else f"probkit::{known[option]}"
        for option in options
    ]
    return f"probkit::{kernel}<{', '.join([type_name(dtype), *words])}>"
