"""BoTorch's compiled kernel of hypervolume improvement: by choice, not in somebody's first ask.

BoTorch compiles a C++ kernel when the first such acquisition function is made, which can take
minutes. Here a kernel that is not loaded yet is left alone, and the Python form used; whoever wants
it loads it ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from probkit.rng import scope

__all__ = ["load_fused_kernel", "without_compiler"]


def _module() -> Any:
    from botorch.acquisition.multi_objective import logei

    return logei


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep BoTorch from starting a compiler; what is loaded already stays in use."""
    module = _module()
    if not hasattr(module, "_load_attempted"):  # A BoTorch that compiles nothing.
        yield
        return
    with scope():  # One lock for everything global.
        before = module._load_attempted
        module._load_attempted = True
        try:
            yield
        finally:
            module._load_attempted = before


def load_fused_kernel() -> bool:
    """Compile and load BoTorch's kernel of hypervolume improvement now; minutes, once a machine.

    Later acquisition functions of several objectives in this process use it.

    Returns:
        Whether it is loaded; without a compiler it is not, and the Python form stays in use.
    """
    import warnings

    module = _module()
    if hasattr(module, "_try_load_fused_kernel"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module._try_load_fused_kernel()
    return getattr(module, "_C", None) is not None
