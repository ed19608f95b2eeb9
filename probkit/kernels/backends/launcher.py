"""Launching the CUDA kernels through CuPy, on the tensors and on the stream of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, MissingExtraError
from probkit.extras import available
from probkit.kernels.backends.cuda_source import source

__all__ = ["THREADS", "Launch", "check_cupy", "launch"]

THREADS = 256
"""Threads of a block, for every kernel."""

Launch = Callable[[str, tuple[int, int], Sequence[Tensor | int | None]], None]
"""Runs one kernel instance on a grid of blocks: name, grid, arguments (None: a null pointer)."""


def launch(kernel: str, grid: tuple[int, int], arguments: Sequence[Tensor | int | None]) -> None:
    """Run a kernel on the current stream of the device that its tensors live on.

    Tensors are handed over without a copy, by DLPack. Nothing waits for the result.

    Args:
        kernel: A name from :func:`~probkit.kernels.backends.cuda_source.name_of`; compiled on first
            use, for the device at hand, and kept by CuPy on disk.
        grid: Blocks along x and y.
        arguments: Contiguous tensors of the kernel's precision, whole numbers, and None.
    """
    import cupy

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        given = [
            cupy.from_dlpack(a.detach()) if isinstance(a, Tensor) else 0 if a is None else a
            for a in arguments
        ]
        _function(kernel)(grid, (THREADS,), tuple(given))


@functools.cache
def _function(kernel: str) -> Any:
    """Compile one instance."""
    import cupy

    module = cupy.RawModule(code=source(), options=("-std=c++17",), name_expressions=(kernel,))
    return module.get_function(kernel)


def check_cupy(device: torch.device | str | None) -> None:
    """See that CuPy is there, fits the CUDA version of PyTorch, and that the data is on a GPU.

    Raises:
        MissingExtraError: CuPy is absent; the extras are named.
        DataError: The data is not on a CUDA device, or CuPy is built for another CUDA major.
    """
    if not available("cupy"):
        raise MissingExtraError(
            "the 'cupy' backend needs CuPy: pip install 'probkit[cuda12]' or 'probkit[cuda13]', "
            "whichever matches the CUDA version"
        )
    if device is not None and torch.device(device).type != "cuda":
        raise DataError(
            f"backend 'cupy': expected data on a CUDA device, got {device}; use 'torch'"
        )
    check_major(torch.version.cuda, _cupy_major())


def _cupy_major() -> int:
    """The CUDA major that the installed CuPy was built for."""
    import cupy

    return int(cupy.cuda.runtime.runtimeGetVersion()) // 1000


def check_major(torch_cuda: str | None, cupy_major: int) -> None:
    """Refuse a CuPy for another CUDA major than that of PyTorch.

    Raises:
        DataError: Both versions, and the extra to install.

    Example:
        >>> check_major("13.0", 13)
    """
    if torch_cuda is None:
        raise DataError(
            "backend 'cupy': expected a PyTorch with CUDA, got one without; install a CUDA build, "
            "or use 'torch'"
        )
    major = int(torch_cuda.partition(".")[0])
    if major != cupy_major:
        raise DataError(
            f"backend 'cupy': expected CuPy for CUDA {major}, which PyTorch was built for, got one "
            f"for CUDA {cupy_major}; pip install 'probkit[cuda{major}]'"
        )
