"""Fixtures of networks and the models that they learn."""

from __future__ import annotations

import pytest
from support.amortised import Line, NormalMean


@pytest.fixture(scope="session")
def normal_mean():
    return NormalMean()


@pytest.fixture(scope="session")
def line():
    return Line()
