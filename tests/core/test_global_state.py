"""The fixture that guards global state catches every kind of change."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import botorch
import gpytorch
import linear_operator
import matplotlib
import numpy as np
import pyro
import pytest
import torch
from support.global_state import changes, snapshot, unchanged
from torch.distributions import Distribution

TESTS = Path(__file__).parents[1]

# The first call loads parts of torch that add warning filters of their own.
torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())


def flip_thread_number():
    torch.set_num_threads(torch.get_num_threads() + 1)


def add_parameter():
    pyro.param("left_over", torch.zeros(()))


def flip_validation():
    Distribution.set_default_validate_args(not Distribution._validate_args)


CHANGES = {
    "torch random stream": lambda: torch.rand(()),
    "numpy random stream": lambda: np.random.rand(),
    "python random stream": random.random,
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "torch threads": flip_thread_number,
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "distribution validation": flip_validation,
    "warning filters": lambda: warnings.simplefilter("once"),
    "numpy error state": lambda: np.seterr(divide="raise"),
    "pyro param store": add_parameter,
    "pyro.settings validate_infer": lambda: pyro.settings.set(validate_infer=False),
    "gpytorch.settings.debug_state": lambda: gpytorch.settings.debug._set_state(False),
    "gpytorch.settings.num_likelihood_samples_global_value": (
        lambda: gpytorch.settings.num_likelihood_samples._set_value(3)
    ),
    "linear_operator.settings.cholesky_jitter_global_double_value": (
        lambda: linear_operator.settings.cholesky_jitter._set_value(None, 1e-2, None)
    ),
    "botorch.settings.propagate_grads_state": lambda: botorch.settings.propagate_grads._set_state(
        True
    ),
    "matplotlib rcParams": lambda: matplotlib.rcParams.update({"lines.linewidth": 9.0}),
    "SIGINT handler": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
}


@pytest.fixture
def restored():
    """Put back by hand everything that the changes below touch."""
    streams = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    grad, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    precision, validate = torch.get_float32_matmul_precision(), Distribution._validate_args
    numpy_errors, handler = np.geterr(), signal.getsignal(signal.SIGINT)
    validate_infer = pyro.settings.get("validate_infer")
    debug = gpytorch.settings.debug._state, botorch.settings.propagate_grads._state
    samples = gpytorch.settings.num_likelihood_samples._global_value
    jitter = linear_operator.settings.cholesky_jitter._global_double_value
    width = matplotlib.rcParams["lines.linewidth"]
    with warnings.catch_warnings():
        yield
    torch.set_rng_state(streams[0])
    np.random.set_state(streams[1])
    random.setstate(streams[2])
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    Distribution.set_default_validate_args(validate)
    np.seterr(**numpy_errors)
    signal.signal(signal.SIGINT, handler)
    pyro.settings.set(validate_infer=validate_infer)
    gpytorch.settings.debug._state, botorch.settings.propagate_grads._state = debug
    gpytorch.settings.num_likelihood_samples._global_value = samples
    linear_operator.settings.cholesky_jitter._global_double_value = jitter
    matplotlib.rcParams["lines.linewidth"] = width
    pyro.get_param_store().clear()


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_seen_and_named(what, restored):
    before = snapshot()
    CHANGES[what]()
    found = changes(before, snapshot())
    # Some settings are aliases of each other; the changed one must be among them.
    assert what in found
    unrelated = {w for w in CHANGES if w != what} - {"distribution validation"}
    assert not unrelated & set(found)


def test_nothing_is_seen_where_nothing_changed():
    before = snapshot()
    torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert changes(before, snapshot()) == []


def test_the_guard_names_what_a_block_changed(restored):
    with pytest.raises(pytest.fail.Exception, match="global state changed: torch random stream"):
        with unchanged():
            torch.rand(())


def test_the_fixture_fails_a_real_test_run(tmp_path):
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.append({str(TESTS)!r})\n"
        "from support.global_state import unchanged_global_state\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import torch\ndef test_bad():\n    torch.rand(())\ndef test_good():\n    pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert "global state changed: torch random stream" in run.stdout
    assert "2 passed" in run.stdout and "1 error" in run.stdout
