"""Training data of a surrogate, checked once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.bo.domain import Domain, as_domain
from probkit.data import as_tensor
from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.numerics import check_finite

__all__ = ["TrainingData", "training_data"]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a surrogate is fitted to, in double precision.

    Attributes:
        X: Inputs [row, feature], as the user has them.
        Y: Outcomes [row, output].
        Yvar: Variances of the outcomes [row, output]; None where they are not known.
        domain: Bounds and kinds of the inputs.
        outcome: Name or object of the outcome transform, see
            :func:`~probkit.bo.surrogates.outcomes.outcome_transform`.
    """

    X: Tensor
    Y: Tensor
    Yvar: Tensor | None
    domain: Domain
    outcome: Any = "standardize"

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return int(self.Y.shape[1])

    def output(self, k: int) -> TrainingData:
        """Return the data of one output."""
        variance = None if self.Yvar is None else self.Yvar[:, k : k + 1]
        return replace(self, Y=self.Y[:, k : k + 1], Yvar=variance)


def training_data(
    X: Any, Y: Any, Yvar: Any = None, *, bounds: Any = None, outcome: Any = "standardize"
) -> TrainingData:
    """Check the observations of a study.

    Args:
        X: Inputs [row, feature].
        Y: Outcomes [row, output], or [row] for one output.
        Yvar: Known variances of the outcomes, of the same shape; None where they are not known.
        bounds: A :class:`~probkit.bo.Domain`, or bounds [2, feature]; None for the unit cube.
        outcome: Outcome transform.

    Raises:
        ShapeError: Shapes that do not match.
        DataError: Fewer than two rows, values that are not finite, negative variances, points
            outside the bounds.

    Warns:
        NumericsWarning: Single precision came, or all outcomes of one output are equal.
    """
    x, y = as_tensor(X, name="X"), as_tensor(Y, name="Y")
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or 0 in (x.shape[1], y.shape[1]):
        raise ShapeError(
            "expected X [row, feature] and Y [row, output] with equally many rows, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    if len(x) < 2:
        raise DataError(f"a surrogate needs at least 2 observations, got {len(x)}; ask for more")
    if x.dtype == torch.float32:
        warnings.warn(
            "X came in float32 and is used in float64: acquisition functions need it; pass "
            "X.double()",
            NumericsWarning,
            stacklevel=3,
        )
    x, y = x.double(), y.double()
    check_finite(x, "X", ("row", "feature"))
    check_finite(y, "Y", ("row", "output"))
    domain = as_domain(bounds, x.shape[1])
    domain.check(x)
    variance = _variances(Yvar, y)
    flat = [k for k in range(y.shape[1]) if bool((y[:, k] == y[0, k]).all())]
    if flat:
        warnings.warn(
            f"all outcomes of output {flat[0]} are equal ({float(y[0, flat[0]]):g}): its scale is "
            "taken to be 1, and the surrogate knows little",
            NumericsWarning,
            stacklevel=3,
        )
    return TrainingData(x, y, variance, domain, outcome)


def _variances(given: Any, y: Tensor) -> Tensor | None:
    if given is None:
        return None
    variance = as_tensor(given, name="Yvar").to(y)
    variance = variance[:, None] if variance.ndim == 1 else variance
    if variance.shape != y.shape:
        raise ShapeError(
            f"Yvar: expected the shape of Y {tuple(y.shape)}, got {tuple(variance.shape)}"
        )
    check_finite(variance, "Yvar", ("row", "output"))
    if bool((variance < 0).any()):
        row = int((variance < 0).any(-1).nonzero()[0])
        raise DataError(
            f"Yvar: expected variances >= 0, got {variance[row].min().item():g} at row {row}"
        )
    return variance
