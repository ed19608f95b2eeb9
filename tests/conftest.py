"""Fixtures of all tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

# These add warning filters when they are first imported (torch imports sympy late); done here so
# that no test is charged with it.
import scipy.stats  # noqa: F401
import sympy  # noqa: F401
import torch

# Helpers of the tests are imported as ``support.<module>``.
sys.path.append(str(Path(__file__).parent))

from support.global_state import unchanged_global_state  # noqa: F401


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded stream; tests never touch the global one."""
    return torch.Generator().manual_seed(20240229)


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests: a job in the background of a shell starts with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
