"""Scores of predicted lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError

__all__ = ["coverage_by_band", "crps", "life_scores", "phm08_score"]


def phm08_score(estimate: Any, truth: Any) -> float:
    """Score of the PHM 2008 challenge, lower is better.

    With d = estimate - truth, the sum of exp(-d / 13) - 1 where d < 0 and of exp(d / 10) - 1
    elsewhere (Saxena, Goebel, Simon and Eklund 2008): late is worse than early.

    Example:
        >>> round(phm08_score([10.0], [20.0]), 6), round(phm08_score([20.0], [10.0]), 6)
        (1.158106, 1.718282)
    """
    d = _errors(estimate, truth)
    return float(torch.where(d < 0, torch.expm1(-d / 13), torch.expm1(d / 10)).sum())


def life_scores(estimate: Any, truth: Any) -> dict[str, float]:
    """Return the usual scores of point estimates.

    Args:
        estimate: Estimated lives [unit].
        truth: Lives [unit].

    Returns:
        ``rmse``, ``mae``, ``mape`` (per cent of the true life), ``phm08``, ``accuracy`` (per cent
        with -13 <= d <= 10), ``early`` and ``late`` (per cent with d < 0, d > 0).
    """
    d = _errors(estimate, truth)
    life = as_tensor(truth, name="truth").double()
    return {
        "rmse": float(d.square().mean().sqrt()),
        "mae": float(d.abs().mean()),
        "mape": float(100 * (d.abs() / life.clamp_min(1.0)).mean()),
        "phm08": phm08_score(estimate, truth),
        "accuracy": float(100 * ((d >= -13) & (d <= 10)).double().mean()),
        "early": float(100 * (d < 0).double().mean()),
        "late": float(100 * (d > 0).double().mean()),
    }


def coverage_by_band(
    predicted: Any,
    truth: Any,
    *,
    level: float = 0.9,
    edges: Sequence[float] = (0.0, 25.0, 50.0, 75.0, 100.0, 125.0, float("inf")),
) -> pd.DataFrame:
    """Tabulate the coverage of central intervals by bands of the true life.

    Args:
        predicted: A predictive over [unit].
        truth: Lives [unit].
        level: Nominal coverage.
        edges: Bounds of the bands.

    Returns:
        Columns ``units``, ``covered`` (share), ``width`` (mean), ``error`` (mean of median minus
        truth); one row a band, and "all".
    """
    if not 0 < level < 1:
        raise DataError(f"level: expected a number in (0, 1), got {level}")
    edges = [float(edge) for edge in edges]
    life = as_tensor(truth, name="truth").double()
    low, middle, high = predicted.quantile([0.5 - level / 2, 0.5, 0.5 + level / 2])
    frame = pd.DataFrame(
        {
            "band": pd.cut(life.numpy(), edges, right=False).astype(str),
            "units": 1,
            "covered": ((low <= life) & (life <= high)).double().numpy(),
            "width": (high - low).double().numpy(),
            "error": (middle - life).double().numpy(),
        }
    )
    how = {"units": "sum", "covered": "mean", "width": "mean", "error": "mean"}
    order = [str(pd.Interval(a, b, closed="left")) for a, b in zip(edges, edges[1:], strict=False)]
    by_band = frame.groupby("band").agg(how).reindex(order).dropna()
    total = frame.assign(band="all").groupby("band").agg(how)
    return pd.concat([by_band, total])


def crps(predicted: Any, truth: Any, *, levels: int = 199) -> Tensor:
    """Continuous ranked probability score [unit], as twice the mean quantile loss over levels."""
    life = as_tensor(truth, name="truth").double()
    q = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    found = predicted.quantile(q).double()
    below = life - found
    return 2 * torch.maximum(q[:, None] * below, (q[:, None] - 1) * below).mean(0)


def _errors(estimate: Any, truth: Any) -> Tensor:
    """Estimate minus truth [unit]."""
    a, b = as_tensor(estimate, name="estimate").double(), as_tensor(truth, name="truth").double()
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ShapeError(
            f"expected estimates and lives [unit] of one shape, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    return a - b
