"""Global state that no public call may change."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributions import Distribution

__all__ = ["global_state", "unchanged_globals"]


def global_state() -> dict[str, Any]:
    """Return what is global, by name; two results compare by ``==``."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    state = {
        "torch random stream": torch.get_rng_state().numpy().tobytes(),
        "numpy random stream": repr(numpy_state),
        "python random stream": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "distribution validation": Distribution._validate_args,
        "warning filters": tuple(map(repr, warnings.filters)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        streams = torch.cuda.get_rng_state_all()
        state["cuda random streams"] = tuple(s.numpy().tobytes() for s in streams)
    if "pyro" in sys.modules:
        state["pyro parameters"] = tuple(sys.modules["pyro"].get_param_store().keys())
    return state


@contextlib.contextmanager
def unchanged_globals() -> Iterator[None]:
    """Fail when the code inside leaves global state changed.

    Example:
        >>> with unchanged_globals():
        ...     _ = torch.rand(2, generator=torch.Generator().manual_seed(0))
    """
    before = global_state()
    yield
    after = global_state()
    changed = [name for name, value in before.items() if after.get(name) != value]
    assert not changed, f"global state changed: {', '.join(changed)}"
