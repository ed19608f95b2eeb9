"""Small switching autoregressions with known answers."""

from __future__ import annotations

import pytest
import torch

from probkit.models.arphmm import Sequences


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture
def tiny():
    """Two states, one lag, five values of which the first is history; and labels."""
    values = {
        "initial": tensor([0.6, 0.4]),
        "transition": tensor([[0.7, 0.3], [0.2, 0.8]]),
        "weights": tensor([[[0.1, 0.9]], [[-0.2, -0.5]]]),
        "covariance": tensor([[[0.25]], [[0.5]]]),
    }
    y = tensor([0.2, 0.5, 1.0, -0.3, 0.8])
    labels = tensor([[1, 1], [1, 0.3], [1, 1], [0.2, 1], [0.5, 0]])
    return values, Sequences([y], labels=[labels]), Sequences([y])


@pytest.fixture
def regimes():
    """Four scalar regimes of order two, two of them not stationary by themselves."""
    return {
        "initial": tensor([0.25] * 4),
        "transition": tensor(
            [[0.5, 0.2, 0.1, 0.2], [0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.5, 0.2], [0.2, 0.1, 0.2, 0.5]]
        ),
        "weights": tensor(
            [[[2, 0.5, 0.75]], [[-2, -0.5, 0.75]], [[4, 0.5, -0.75]], [[-4, -0.5, -0.75]]]
        ),
        "covariance": tensor([0.04, 0.25, 0.49, 0.81]).reshape(4, 1, 1),
    }
