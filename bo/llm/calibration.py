"""Whether predictions know how wrong they are, learned from rows that they did not see.

Language models rank settings well before they know how sure to be. Each row of the history is
predicted from all the others; the errors, in units of the predicted standard deviations, tell how
these are to be scaled. That takes as many predictions as there are rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite
from probkit.rng import Rng, seed_of, stream

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CoverageReport",
    "LeftOut",
    "Predictor",
    "SigmaCalibration",
    "coverage_report",
    "fit_calibration",
    "leave_one_out",
]

Method = Literal["moment", "conformal", "isotonic"]

#: Smallest standard deviation, as a share of the range of the values.
_FLOOR = 1e-3
#: As if so many predictions had been right about themselves before the first was seen.
_PRIOR_ROWS = 2.0


class LeftOut(NamedTuple):
    """Predictions of rows from all others.

    Attributes:
        mean: [row].
        sd: Standard deviations [row].
    """

    mean: Tensor
    sd: Tensor


class Predictor(Protocol):
    """Anything that predicts values at points from a history."""

    def __call__(
        self, X: Tensor, Y: Tensor, at: Tensor, *, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations [point].

        Args:
            X: Points seen [row, feature].
            Y: Their values [row].
            at: Points to predict [point, feature].
            rng: Stream.
        """
        ...


def leave_one_out(
    predict: Predictor, X: Tensor, Y: Tensor, *, rows: Sequence[int] | None = None, rng: Rng
) -> LeftOut:
    """Predict rows from all others.

    Args:
        predict: Called once for each row.
        X: Points [row, feature].
        Y: Values [row].
        rows: Which rows; None for all.
        rng: Seed or generator; row k gets the same stream whichever other rows are asked for.

    Raises:
        ShapeError: Shapes that do not match.
        DataError: Fewer than two rows, or values that are not finite.

    Example:
        >>> def mean_of_the_rest(X, Y, at, *, rng):
        ...     return Y.mean().expand(len(at)), Y.std().expand(len(at))
        >>> X, Y = torch.zeros(3, 1), torch.tensor([0.0, 3.0, 6.0])
        >>> leave_one_out(mean_of_the_rest, X, Y, rng=0).mean.tolist()
        [4.5, 3.0, 1.5]
    """
    if X.ndim != 2 or Y.shape != (len(X),):
        raise ShapeError(
            f"expected X [row, feature] and Y [row], got {tuple(X.shape)} and {tuple(Y.shape)}"
        )
    if len(X) < 2:
        raise DataError(f"leaving one out needs at least 2 rows, got {len(X)}")
    check_finite(Y, "Y", ("row",))
    seed = seed_of(rng)
    means, sds = [], []
    for k in range(len(X)) if rows is None else rows:
        keep = torch.arange(len(X)) != k
        mean, sd = predict(X[keep], Y[keep], X[k : k + 1], rng=stream(seed, "left out", k))
        means.append(mean.reshape(()))
        sds.append(sd.reshape(()))
    empty = Y.new_empty(0)
    return LeftOut(
        torch.stack(means) if means else empty, torch.stack(sds) if sds else empty.clone()
    )


@dataclass(frozen=True, eq=False)
class SigmaCalibration:
    """How predicted standard deviations are to be changed.

    Attributes:
        method: How it was fitted.
        scale: One factor for all; the root mean square of the changes for "isotonic".
        knots: For "isotonic": predicted standard deviations [knot], ascending; else None.
        heights: For "isotonic": what they become [knot]; else None.
        floor: Smallest standard deviation returned.
    """

    method: Method
    scale: float
    knots: Tensor | None = None
    heights: Tensor | None = None
    floor: float = 0.0

    def sd(self, sd: Tensor) -> Tensor:
        """Return calibrated standard deviations, shaped as the predicted ones."""
        if self.knots is None or self.heights is None:
            return (self.scale * sd).clamp_min(self.floor)
        return _interpolate(sd, self.knots, self.heights).clamp_min(self.floor)


def fit_calibration(
    mean: Tensor,
    sd: Tensor,
    values: Tensor,
    *,
    method: Method = "moment",
    level: float = 0.68,
) -> SigmaCalibration:
    """Learn how standard deviations must be changed to fit the errors.

    "moment" makes the mean square of the standardised errors one, shrunk towards no change as by
    two calibrated predictions more. "conformal" takes the ceil((n + 1) level)-th smallest absolute
    standardised error, so that central intervals of that level hold a new value with at least that
    probability if rows are exchangeable (Lei, G'Sell, Rinaldo, Tibshirani and Wasserman 2018;
    normalised by the predicted standard deviation). Too few rows for the level take the largest
    error. "isotonic" lets the standard deviation be any increasing function of the predicted one:
    monotone least squares of the squared errors.

    Args:
        mean: Predictions of rows left out [row].
        sd: Their standard deviations [row].
        values: What was measured [row].
        method: "moment", "conformal" or "isotonic".
        level: For "conformal".

    Raises:
        DataError: Options out of range, numbers that are not finite, or no rows.
        ShapeError: Shapes that do not match.

    Example:
        >>> y = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0], dtype=torch.float64)
        >>> round(fit_calibration(0 * y, 0 * y + 1, y).scale, 3)  # sqrt((2 + 6 * 9) / (2 + 6))
        2.646
    """
    floor = _checked(mean, sd, values)
    if method not in ("moment", "conformal", "isotonic"):
        raise DataError(f"method: expected 'moment', 'conformal' or 'isotonic', got {method!r}")
    if not 0 < level < 1:
        raise DataError(f"level: expected a probability in (0, 1), got {level!r}")
    sd = sd.clamp_min(floor)
    z = (values - mean).abs() / sd
    if method == "moment":
        scale = math.sqrt((_PRIOR_ROWS + float(z.square().sum())) / (_PRIOR_ROWS + len(z)))
        return SigmaCalibration(method, scale, floor=floor)
    if method == "conformal":
        rank = min(len(z), math.ceil((len(z) + 1) * level))
        width = float(z.sort().values[rank - 1])
        normal = float(torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)))
        return SigmaCalibration(method, max(width, 1e-12) / normal, floor=floor)
    knots, heights = _isotonic(sd, (values - mean).square())
    scale = float((heights / knots.square()).mean().sqrt())
    return SigmaCalibration(method, scale, knots, heights.sqrt(), floor)


def _checked(mean: Tensor, sd: Tensor, values: Tensor) -> float:
    """Check predictions; return the smallest standard deviation that counts."""
    if not (mean.shape == sd.shape == values.shape) or mean.ndim != 1:
        raise ShapeError(
            "expected mean, sd and values [row], got "
            f"{tuple(mean.shape)}, {tuple(sd.shape)} and {tuple(values.shape)}"
        )
    if not len(mean):
        raise DataError("calibration needs at least one prediction of a row left out, got none")
    for tensor, name in ((mean, "mean"), (sd, "sd"), (values, "values")):
        check_finite(tensor, name, ("row",))
    if bool((sd < 0).any()):
        raise DataError(f"sd: expected standard deviations >= 0, got {float(sd.min()):g}")
    extent = float(values.max() - values.min())
    return _FLOOR * extent if extent > 0 else 1e-12


def _isotonic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the increasing step function nearest to y by pooling neighbours that fall."""
    order = x.argsort(stable=True)
    blocks: list[list[float]] = []  # sum, count
    for value in y[order].tolist():
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    heights = [total / count for total, count in blocks for _ in range(int(count))]
    return x[order], torch.tensor(heights, dtype=y.dtype)


def _interpolate(x: Tensor, knots: Tensor, heights: Tensor) -> Tensor:
    """Piecewise linear, constant beyond the outer knots."""
    if len(knots) == 1:
        return heights.expand_as(x).clone()
    right = torch.searchsorted(knots.contiguous(), x.contiguous()).clamp(1, len(knots) - 1)
    low, high = knots[right - 1], knots[right]
    share = ((x - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
    return torch.lerp(heights[right - 1], heights[right], share)


@dataclass(frozen=True, eq=False)
class CoverageReport:
    """How predictions of rows left out compare with what was measured.

    Attributes:
        rows: Number of rows.
        levels: Probabilities of the central intervals.
        raw: Share of values inside, as predicted [level].
        calibrated: The same after calibration; each row by one fitted to the others [level].
        nrmse: Root mean squared error over the range of the values.
        log_density: Mean log density of the values under normal laws as predicted; nothing is left
            out of the mean.
        calibrated_log_density: The same after calibration.
        scale: Factor of the calibration fitted to all rows.
    """

    rows: int
    levels: tuple[float, ...]
    raw: tuple[float, ...]
    calibrated: tuple[float, ...]
    nrmse: float
    log_density: float
    calibrated_log_density: float
    scale: float

    def table(self) -> pd.DataFrame:
        """Return coverage by level, as predicted and calibrated."""
        import pandas as pd

        return pd.DataFrame(
            {"as predicted": self.raw, "calibrated": self.calibrated},
            index=pd.Index([f"{level:.0%}" for level in self.levels], name="central interval"),
        )


def coverage_report(
    mean: Tensor,
    sd: Tensor,
    values: Tensor,
    *,
    levels: Sequence[float] = (0.68, 0.95),
    method: Method = "moment",
) -> CoverageReport:
    """Judge predictions of rows left out, as they are and calibrated.

    Args:
        mean: Predictions [row].
        sd: Their standard deviations [row].
        values: What was measured [row].
        levels: Probabilities of central intervals.
        method: As for :func:`fit_calibration`.

    Raises:
        DataError: Fewer than two rows, and as for :func:`fit_calibration`.
    """
    floor = _checked(mean, sd, values)
    if len(mean) < 2:
        raise DataError("a coverage report needs at least 2 rows, got 1")
    whole = fit_calibration(mean, sd, values, method=method)
    rows = torch.arange(len(mean))
    own = torch.stack(
        [
            fit_calibration(
                mean[rows != k], sd[rows != k], values[rows != k], method=method
            ).sd(sd[k : k + 1])[0]
            for k in range(len(mean))
        ]
    )  # fmt: skip
    raw = sd.clamp_min(floor)
    own = own.clamp_min(floor)
    extent = float(values.max() - values.min())
    rmse = float((values - mean).square().mean().sqrt())
    return CoverageReport(
        rows=len(mean),
        levels=tuple(levels),
        raw=tuple(_inside(mean, raw, values, level) for level in levels),
        calibrated=tuple(_inside(mean, own, values, level) for level in levels),
        nrmse=rmse / extent if extent > 0 else math.nan,
        log_density=_log_density(mean, raw, values),
        calibrated_log_density=_log_density(mean, own, values),
        scale=whole.scale,
    )


def _inside(mean: Tensor, sd: Tensor, values: Tensor, level: float) -> float:
    if not 0 < level < 1:
        raise DataError(f"levels: expected probabilities in (0, 1), got {level!r}")
    normal = torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64))
    return float(((values - mean).abs() <= normal * sd).double().mean())


def _log_density(mean: Tensor, sd: Tensor, values: Tensor) -> float:
    z = (values - mean) / sd
    return float((-0.5 * z.square() - sd.log() - 0.5 * math.log(2 * math.pi)).mean())
