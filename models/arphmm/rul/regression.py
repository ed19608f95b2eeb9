"""Remaining life by regressions that switch with the state of degradation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.arphmm.lagged import Lagged
from probkit.models.arphmm.prediction import flat_draws
from probkit.models.arphmm.sequences import Sequences
from probkit.predictive import Mixture

__all__ = ["LifeRegression", "TrailingFeatures"]


@storable
@dataclass(frozen=True)
class TrailingFeatures:
    """Trailing means of each feature, and the age of the unit.

    Args:
        windows: Numbers of steps that means are taken over (fewer at the beginning); 1 is the
            present value.
        age: Whether the number of steps so far, and its square, are regressors.
        unit: Steps that make one unit of age.
    """

    windows: tuple[int, ...] = (1, 5, 10, 30, 60)
    age: bool = True
    unit: float = 200.0

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 1:
            raise DataError(f"windows: expected whole numbers >= 1, got {self.windows}")

    def __call__(self, y: Tensor) -> Tensor:
        """Return regressors [time, regressor] of a sequence [time, feature], one leading."""
        steps = torch.arange(1, len(y) + 1, device=y.device)
        total = torch.cat([torch.zeros_like(y[:1]), y.cumsum(0)])
        columns = [torch.ones_like(y[:, :1])]
        for window in self.windows:
            start = (steps - window).clamp_min(0)
            columns.append((total[steps] - total[start]) / (steps - start)[:, None])
        if self.age:
            age = (steps / self.unit).to(y)[:, None]
            columns += [age, age.square()]
        return torch.cat(columns, 1)


@storable
@dataclass(frozen=True)
class LifeRegression:
    """Remaining life given the state k and trailing features f_t: N(coefficients_k f_t, s_k).

    The law of the state is that of the filter, which sees the past only, so that

        p(life | y_1, ..., y_t) = sum_k p(z_t = k | y_1, ..., y_t) N(life; coefficients_k f_t, s_k)

    (the state-wise regression of Juesas, Ramasso, Drujont and Placet 2016, on features of the
    health indicator rather than on past lives, which are not known when it is used).

    Attributes:
        model: The :class:`~probkit.models.ARPHMM`.
        values: Its parameters, [draw, *site].
        features: How regressors are made.
        coefficients: [state, regressor].
        variance: [state].
        cap: Largest life that is told apart: what is predicted is min(life, cap).
    """

    model: Any
    values: dict[str, Tensor]
    features: TrailingFeatures
    coefficients: Tensor
    variance: Tensor
    cap: float

    @classmethod
    def fit(
        cls,
        posterior: Any,
        units: Any,
        remaining: Sequence[Any],
        *,
        features: TrailingFeatures | None = None,
        cap: float = 130.0,
        ridge: float = 1e-3,
    ) -> LifeRegression:
        """Fit one weighted regression a state, weights from the filter.

        Args:
            posterior: A fit of an :class:`~probkit.models.ARPHMM`; draws are averaged over.
            units: :class:`Sequences` of indicators; labels are not used.
            remaining: Steps left until failure [time], for each unit.
            features: How regressors are made.
            cap: Lives above it count as it: long before failure nothing tells them apart.
            ridge: Ridge penalty.

        Raises:
            ShapeError: ``remaining`` does not fit ``units``.
            DataError: A remaining life is negative or not finite.
        """
        model, values = posterior.model, flat_draws(posterior)
        features = TrailingFeatures() if features is None else features
        rows: Lagged = model.prepare(units)
        rows = model.prepare(rows.sequences.without_labels())
        lives = _checked(remaining, rows.sequences)
        probs = _filtered(model, values, rows)
        designs, targets, weights = [], [], []
        for n, y in enumerate(rows.sequences.y):
            start, steps = int(rows.first[n]), int(rows.lengths[n])
            designs.append(features(y)[start : start + steps])
            targets.append(lives[n][start : start + steps].clamp_max(cap))
            weights.append(probs[n, :steps])
        x, target, weight = torch.cat(designs), torch.cat(targets), torch.cat(weights)
        xx = torch.einsum("tk,ti,tj->kij", weight, x, x)
        xx = xx + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        xy = torch.einsum("tk,ti,t->ki", weight, x, target)
        coefficients = torch.linalg.solve(xx, xy)
        residual = target[:, None] - x @ coefficients.mT
        # One pseudo-observation of one squared step: an empty state keeps a proper variance.
        variance = ((weight * residual.square()).sum(0) + 1.0) / (weight.sum(0) + 1.0)
        return cls(model, values, features, coefficients, variance, cap)

    def predict(self, units: Any, *, times: Sequence[int] | None = None) -> Mixture:
        """Predict the remaining life of each unit at one time.

        Args:
            units: :class:`Sequences` of indicators up to now.
            times: Position in each sequence [unit]; None for its end.

        Returns:
            A mixture over [unit]; its components are the states.

        Raises:
            DataError: A time lies outside what the filter covers.
        """
        rows: Lagged = self.model.prepare(units)
        rows = self.model.prepare(rows.sequences.without_labels())
        probs = _filtered(self.model, self.values, rows)
        ends = [length - 1 for length in rows.sequences.lengths]
        chosen = ends if times is None else [int(t) for t in times]
        first = rows.first.tolist()
        for n, (t, end) in enumerate(zip(chosen, ends, strict=True)):
            if not first[n] <= t <= end:
                raise DataError(f"times: expected {first[n]}..{end} for unit {n}, got {t}")
        design = torch.stack(
            [self.features(y[: t + 1])[-1] for y, t in zip(rows.sequences.y, chosen, strict=True)]
        )
        weight = torch.stack([probs[n, t - first[n]] for n, t in enumerate(chosen)])
        mean = (design @ self.coefficients.mT).mT
        sd = self.variance.sqrt()[:, None].expand_as(mean)
        tiny = torch.finfo(weight.dtype).tiny
        law = Normal(mean, sd, validate_args=False)
        return Mixture(law, weight.clamp_min(tiny).log().mT, dims=("unit",))


def _filtered(model: Any, values: dict[str, Tensor], rows: Lagged) -> Tensor:
    """Filtered state probabilities [N, T, K], averaged over draws."""
    filtered: Tensor = model.filter(values, rows).filtered
    return filtered.mean(0)


def _checked(remaining: Sequence[Any], sequences: Sequences) -> list[Tensor]:
    """Remaining lives [time] of every unit."""
    if len(remaining) != len(sequences):
        raise ShapeError(
            f"remaining: expected one array for each of {len(sequences)} units, got "
            f"{len(remaining)}"
        )
    found = []
    for n, (one, y) in enumerate(zip(remaining, sequences.y, strict=True)):
        life = as_tensor(one, name=f"remaining of unit {n}").to(y)
        if tuple(life.shape) != (len(y),):
            raise ShapeError(
                f"remaining: expected [time={len(y)}] for unit {n}, got {tuple(life.shape)}"
            )
        if not bool((torch.isfinite(life) & (life >= 0)).all()):
            raise DataError(f"remaining: expected finite lives >= 0, unit {n} has others")
        found.append(life)
    return found
