"""Spaces and functions that the tests of language-model search share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probkit.bo import Categorical, Float, Int, Space
from probkit.bo.llm.cards import ProblemCard


def forest() -> Space:
    return Space(
        max_depth=Int(1, 15),
        max_features=Float(0.01, 0.99),
        min_impurity_decrease=Float(0.0, 0.5),
        min_samples_leaf=Float(0.01, 0.49),
        min_samples_split=Float(0.01, 0.99),
        min_weight_fraction_leaf=Float(0.01, 0.49),
    )


SPACES = {
    "forest": forest(),
    "svm": Space(
        C=Float(1, 1e3, log=True),
        gamma=Float(1e-4, 1e-3, log=True),
        tol=Float(1e-5, 1e-1, log=True),
    ),
    "boosting": Space(n_estimators=Int(10, 100), learning_rate=Float(1e-4, 1e1, log=True)),
    "network": Space(
        hidden_layer_sizes=Int(50, 200),
        alpha=Float(1e-5, 1e1, log=True),
        batch_size=Int(10, 250),
        learning_rate_init=Float(1e-5, 1e-1, log=True),
        power_t=Float(0.1, 0.9),
        momentum=Float(0.001, 0.999),
    ),
    "mixed": Space(
        width=Int(1, 4096, log=True),
        size=Categorical([0.1, 0.25, 1.0, 2.5], ordered=True),
        act=Categorical(["relu", "tanh", "leaky relu"]),
        slope=Float(1e-9, 3e-9, when={"act": "leaky relu"}),
        bias=Categorical([True, False, None, 0.001, 7]),
        shift=Float(-5.0, 1e7),
        narrow=Float(0.1, 0.14),
    ),
}


@pytest.fixture
def plane() -> Space:
    """Two numbers in the unit square."""
    return Space(a=Float(0, 1), b=Float(0, 1))


@pytest.fixture
def card() -> ProblemCard:
    return ProblemCard("a network", "loss", "min")


def bowl(params: Any) -> float:
    """A function with its minimum 0 at (0.3, 0.7)."""
    return float((params["a"] - 0.3) ** 2 + (params["b"] - 0.7) ** 2)


def observations(space: Space, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and values of :func:`bowl`."""
    X = space.random_codes(n, rng=torch.Generator().manual_seed(seed))
    return X, torch.tensor([bowl(p) for p in space.from_codes(X)], dtype=torch.float64)
