"""A snapshot of the global state that no public call may change, and the fixture that guards it."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import warnings

import gpytorch
import linear_operator
import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Distribution


def _settings(prefix, module):
    """State of the flag and value classes of gpytorch, linear_operator and botorch settings."""
    state = {}
    for name, cls in vars(module).items():
        if isinstance(cls, type):
            for field in dir(cls):
                if field == "_state" or field.startswith("_global"):
                    state[f"{prefix}.{name}{field}"] = getattr(cls, field)
    return state


def snapshot():
    """Return {what: value} for every piece of global state; values compare by ``==``."""
    numpy_state = np.random.get_state()
    state = {
        "torch random stream": torch.get_rng_state().numpy().tobytes(),
        "numpy random stream": (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
        "python random stream": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "torch threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "distribution validation": Distribution._validate_args,
        "warning filters": tuple(warnings.filters),
        "numpy error state": tuple(np.geterr().items()),
        "pyro param store": tuple(pyro.get_param_store().keys()),
        **{f"pyro.settings {name}": value for name, value in pyro.settings.get().items()},
        **_settings("gpytorch.settings", gpytorch.settings),
        **_settings("linear_operator.settings", linear_operator.settings),
    }
    if threading.current_thread() is threading.main_thread():
        state["SIGINT handler"] = signal.getsignal(signal.SIGINT)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        state["cuda random streams"] = [s.numpy().tobytes() for s in states]
    if "botorch" in sys.modules:
        state |= _settings("botorch.settings", sys.modules["botorch"].settings)
    if "matplotlib" in sys.modules:
        # The backend is chosen by whatever opens the first figure.
        params = sys.modules["matplotlib"].rcParams.copy()
        state["matplotlib rcParams"] = {k: repr(v) for k, v in params.items() if k != "backend"}
    return state


def changes(before, after):
    """Name what differs; libraries that were loaded in between are not compared."""
    return [what for what, value in before.items() if what in after and after[what] != value]


@contextlib.contextmanager
def unchanged():
    """Fail when the body changes global state."""
    before = snapshot()
    yield
    changed = changes(before, snapshot())
    if changed:
        pytest.fail(f"global state changed: {', '.join(changed)}", pytrace=False)


@pytest.fixture(autouse=True)
def unchanged_global_state():
    """Compare the global state before and after every test."""
    with unchanged():
        yield
