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


@pytest.fixture(scope="session")
def lc():
    """The shipped predictor of learning curves, loaded once."""
    from probkit.models.pfn.learning_curve import LearningCurvePFN

    return LearningCurvePFN.load()
