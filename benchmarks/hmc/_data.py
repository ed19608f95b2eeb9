"""Data of the sampling benchmarks: NumPy only, so that every environment builds the same."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BNN_GRID", "CHECK", "DATA", "network"]

Arrays = dict[str, Any]


def _schools() -> Arrays:
    """Eight schools (Rubin 1981): effects and their standard errors."""
    return {
        "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def _logistic() -> Arrays:
    """Logistic regression, 1000 observations of 25 predictors, the first an intercept."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 25))
    x[:, 0] = 1.0
    weights = rng.standard_normal(25)
    y = rng.random(1000) < 1.0 / (1.0 + np.exp(-x @ weights))
    return {"x": x, "y": y.astype(float)}


def _normal() -> Arrays:
    """Precision matrix [100, 100] of a normal with correlated, unequal coordinates."""
    rng = np.random.default_rng(0)
    size = 100
    place = np.arange(size)
    scale = np.exp(rng.uniform(-1.0, 1.0, size))
    correlation = 0.8 ** np.abs(place[:, None] - place[None, :])
    precision = np.linalg.inv(correlation * scale[:, None] * scale[None, :])
    return {"precision": 0.5 * (precision + precision.T), "sd": scale}


def _radon() -> Arrays:
    """Varying intercepts: 919 houses in 85 counties, floor as predictor, simulated."""
    rng = np.random.default_rng(0)
    houses, counties = 919, 85
    county = np.sort(np.concatenate([np.arange(counties), rng.integers(0, counties, 834)]))
    floor = (rng.random(houses) < 0.17).astype(float)
    intercept = 1.5 + 0.35 * rng.standard_normal(counties)
    y = intercept[county] - 0.65 * floor + 0.75 * rng.standard_normal(houses)
    return {"county": county, "floor": floor, "y": y}


def _bnn() -> Arrays:
    """50 noisy points of a smooth function of one input."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.0, 1.0, 50)
    y = np.sin(4.0 * x) + 0.5 * x + 0.1 * rng.standard_normal(50)
    return {"x": x[:, None], "y": y}


BNN_GRID = np.linspace(-1.0, 1.0, 9)[:, None]
DATA = {
    "eight schools": _schools,
    "logistic": _logistic,
    "normal 100": _normal,
    "radon": _radon,
    "BNN 2x50": _bnn,
}

#: Rounded posterior means and standard deviations of the first entries: origin and unit in which
#: the sides' means are compared. They judge nobody, so that any values near these would do.
CHECK: dict[str, tuple[list[float], list[float]]] = {
    "eight schools": ([4.4, 3.6, 0.3, 0.1, -0.1, 0.1], [3.3, 3.2, 1.0, 0.93, 0.98, 0.94]),
    "logistic": ([0.47, -0.59, 0.01, -0.5, 0.21, -0.7], [0.11] * 6),
    "normal 100": ([0.0] * 6, [1.3, 0.63, 0.4, 0.38, 1.9, 2.3]),
    "radon": ([1.54, 0.77, -0.67, 0.4, 0.2, 0.5], [0.051, 0.019, 0.071, 0.043, 0.49, 0.53]),
    "BNN 2x50": (
        [0.184, -0.516, -1.06, -0.992, -0.05, 0.996],
        [0.049, 0.04, 0.039, 0.034, 0.042, 0.028],
    ),
}


def network(values: Arrays, x: Any) -> Any:
    """Return the function [*lead, row] of the network at inputs [row, input]."""
    root = np.sqrt(values["w2"].shape[-1])
    hidden = np.tanh(x @ values["w1"] + values["b1"][..., None, :])
    hidden = np.tanh(hidden @ values["w2"] / root + values["b2"][..., None, :])
    return (hidden @ values["w3"][..., None])[..., 0] / root + values["b3"][..., None]
