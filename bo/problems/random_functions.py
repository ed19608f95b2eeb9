"""Random functions of many variables: polynomials, and draws of networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.bo.outcomes import Outcomes
from probkit.bo.parameters import Float
from probkit.bo.problems.base import Problem
from probkit.bo.space import Params, Space
from probkit.errors import DataError
from probkit.rng import Rng, stream

__all__ = ["BNNDraw", "Polynomial"]


def _cube(features: int) -> Space:
    return Space({f"x{k}": Float(0.0, 1.0) for k in range(features)})


def _vector(params: Params, features: int) -> Tensor:
    values = [float(params[f"x{k}"]) for k in range(features)]
    return torch.tensor(values, dtype=torch.float64)


class Polynomial(Problem):
    """A sum of products, f(x) = sum_j prod_i (x_ij - c_ij) with c_ij ~ N(0, 1); minimise it.

    Li, Rudner and Wilson (2024) use 200 variables in 50 products of 4. Every product is linear in
    each of its variables, so its minimum lies at a corner of its own four, and the best value is
    known.

    Args:
        terms: Number of products.
        degree: Variables of each.
        rng: Draws the c_ij.

    Example:
        >>> problem = Polynomial(terms=3, degree=2, rng=0)
        >>> problem.regret(problem({f"x{k}": 0.5 for k in range(6)})) >= 0
        True
    """

    def __init__(self, terms: int = 50, degree: int = 4, *, rng: Rng = 0) -> None:
        if min(terms, degree) < 1 or degree > 16:
            raise DataError(
                f"Polynomial: expected terms >= 1 and degree in [1, 16], got {terms}, {degree}"
            )
        generator = stream(rng, "polynomial")
        self.centres = torch.randn(degree, terms, generator=generator, dtype=torch.float64)
        self.features = terms * degree
        self.space = _cube(self.features)
        self.outcomes = Outcomes({"value": "min"})
        self.best = float(self._corner_values().min(0).values.sum())

    def _corner_values(self) -> Tensor:
        """Value of every product at each of its corners [corner, term]."""
        degree = len(self.centres)
        corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=degree)))
        return (corners.double()[:, :, None] - self.centres).prod(1)

    def value(self, X: Tensor) -> Tensor:
        """Return f [*batch] at points [*batch, feature], differentiably."""
        shaped = X.reshape(*X.shape[:-1], *self.centres.shape)
        return (shaped - self.centres.to(X)).prod(-2).sum(-1)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return the value."""
        return {"value": float(self.value(_vector(params, self.features)))}


class BNNDraw(Problem):
    """A tanh network with random weights, all N(0, 1), on the unit cube; minimise it.

    Li, Rudner and Wilson (2024) use 400 variables and two hidden layers of 256 units.

    Args:
        features: Number of variables.
        hidden: Widths of the hidden layers.
        rng: Draws the weights.

    Example:
        >>> problem = BNNDraw(3, hidden=(8,), rng=0)
        >>> problem.value(torch.zeros(5, 3, dtype=torch.float64)).shape
        torch.Size([5])
    """

    def __init__(
        self, features: int = 400, hidden: Sequence[int] = (256, 256), *, rng: Rng = 0
    ) -> None:
        if features < 1 or any(width < 1 for width in hidden):
            raise DataError(
                f"BNNDraw: expected features and widths >= 1, got {features}, {list(hidden)}"
            )
        generator = stream(rng, "network")
        widths = [features, *hidden, 1]
        self.layers = [
            (
                torch.randn(wide, narrow, generator=generator, dtype=torch.float64),
                torch.randn(narrow, generator=generator, dtype=torch.float64),
            )
            for wide, narrow in itertools.pairwise(widths)
        ]
        self.features = features
        self.space = _cube(features)
        self.outcomes = Outcomes({"value": "min"})

    def value(self, X: Tensor) -> Tensor:
        """Return f [*batch] at points [*batch, feature], differentiably."""
        for number, (weight, bias) in enumerate(self.layers):
            X = torch.tanh(X) if number else X
            X = X @ weight.to(X) + bias.to(X)
        return X.squeeze(-1)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return the value."""
        return {"value": float(self.value(_vector(params, self.features)))}
