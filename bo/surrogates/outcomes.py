"""Outcome transforms: standardisation, and two that withstand heavy tails."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.transforms.outcome import Bilog, ChainedOutcomeTransform, OutcomeTransform
from botorch.models.transforms.outcome import Standardize as _Standardize
from botorch.posteriors.posterior import Posterior
from botorch.posteriors.transformed import TransformedPosterior
from torch import Tensor

from probkit.errors import DataError

__all__ = ["OUTCOMES", "RankGaussian", "Winsorize", "outcome_transform"]

OUTCOMES = ("standardize", "winsorize", "bilog", "rank", "none")
"""Names that ``outcome=`` accepts."""

_NORMAL_MAD = 1.4826  # One over the 75 % quantile of the standard normal law.


class Winsorize(_Standardize):
    """Clip outcomes far below the bulk, then standardise.

    Outcomes are maximised: one that is ``width`` robust standard deviations below the median says
    "bad", and how bad does not matter, but left alone it would squeeze all others together.
    The bulk is measured by the median and by the median distance from it, taken above the median so
    that bad outcomes have no say. Predictions are on the original scale, below the clip as well.

    Args:
        m: Number of outputs.
        width: Where to clip, in robust standard deviations below the median.
    """

    def __init__(self, m: int, width: float = 3.0, **options: Any) -> None:
        if not 0.0 < width < float("inf"):
            raise DataError(f"Winsorize: expected width > 0, got {width}")
        super().__init__(m=m, **options)
        self.width = width

    def forward(
        self, Y: Tensor, Yvar: Tensor | None = None, X: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Clip and standardise; in training the scale is that of ``Y`` [*batch, row, output]."""
        if self.training:
            Y = torch.maximum(Y, lower_fence(Y, self.width))
        scaled: tuple[Tensor, Tensor | None] = super().forward(Y, Yvar, X)
        return scaled

    def subset_output(self, idcs: list[int]) -> OutcomeTransform:
        """Return the transform of some outputs."""
        part: OutcomeTransform = super().subset_output(idcs)
        return part


def lower_fence(Y: Tensor, width: float) -> Tensor:
    """Return median - ``width`` robust standard deviations [*batch, 1, output]."""
    middle = Y.quantile(0.5, dim=-2, keepdim=True)
    above = torch.where(middle <= Y, Y - middle, torch.nan)
    spread = _NORMAL_MAD * above.nanquantile(0.5, dim=-2, keepdim=True)
    # Where half of the outcomes are equal there is no bulk to speak of: nothing is clipped.
    return torch.where(spread > 0, middle - width * spread, -torch.inf)


class RankGaussian(OutcomeTransform):
    """Give the outcomes the ranks' normal scores: any increasing change of units is ignored.

    Score k of n is the normal quantile at (k - 1/2) / n; equal outcomes share their mean score.
    Between outcomes the map is linear, and beyond them it goes on with the mean slope.

    Args:
        m: Number of outputs.
    """

    def __init__(self, m: int) -> None:
        super().__init__()
        self._m = m
        self.knots: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, Y: Tensor, Yvar: Tensor | None = None, X: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map outcomes [row, output] to scores; variances by the slope of the map."""
        if self.training:
            if Y.ndim != 2 or Y.shape[-1] != self._m:
                raise DataError(
                    f"RankGaussian: expected Y [row, output={self._m}], got {tuple(Y.shape)}"
                )
            self.knots = [_knots(Y[:, k]) for k in range(self._m)]
        pairs = [_map(Y[..., k], *self.knots[k]) for k in range(self._m)]
        scores = torch.stack([value for value, _ in pairs], -1)
        if Yvar is None:
            return scores, None
        return scores, Yvar * torch.stack([slope for _, slope in pairs], -1).square()

    def untransform(
        self, Y: Tensor, Yvar: Tensor | None = None, X: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map scores [*, output] back to outcomes."""
        pairs = [_map(Y[..., k], *self.knots[k][::-1]) for k in range(self._m)]
        values = torch.stack([value for value, _ in pairs], -1)
        if Yvar is None:
            return values, None
        return values, Yvar * torch.stack([slope for _, slope in pairs], -1).square()

    def untransform_posterior(self, posterior: Posterior, X: Tensor | None = None) -> Posterior:
        """Return the posterior on the original scale, known by its draws."""
        return TransformedPosterior(
            posterior=posterior, sample_transform=lambda draws: self.untransform(draws)[0]
        )

    def subset_output(self, idcs: list[int]) -> OutcomeTransform:
        """Return the transform of some outputs."""
        part = RankGaussian(len(idcs))
        part.knots = [self.knots[k] for k in idcs]
        part.train(self.training)
        return part


def _knots(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct outcomes, ascending, and their mean normal scores."""
    values, inverse, counts = y.unique(return_inverse=True, return_counts=True)
    if len(values) == 1:
        return torch.cat([values, values + 1]), y.new_tensor([0.0, 1.0])
    rank = torch.arange(1, len(y) + 1, dtype=y.dtype, device=y.device)
    scores = torch.special.ndtri((rank - 0.5) / len(y))
    owner = inverse.sort().values
    total = torch.zeros_like(values).index_add_(0, owner, scores)
    return values, total / counts


def _map(value: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate linearly from the knots ``source`` to ``target``; return values and slopes."""
    inner = (target[1:] - target[:-1]) / (source[1:] - source[:-1])
    mean = ((target[-1] - target[0]) / (source[-1] - source[0])).reshape(1)
    slopes = torch.cat([mean, inner, mean])
    part = torch.searchsorted(source, value.detach().contiguous(), right=True)
    anchor = (part - 1).clamp(min=0)
    slope = slopes[part]
    return target[anchor] + slope * (value - source[anchor]), slope


def outcome_transform(outcome: Any, outputs: int) -> OutcomeTransform | None:
    """Make the outcome transform of that name.

    Args:
        outcome: "standardize"; "winsorize", which clips bad outliers first; "bilog", for
            constraints whose sign matters most; "rank", which looks at nothing but the order;
            "none"; or a BoTorch ``OutcomeTransform``, returned as it is.
        outputs: Number of outputs.

    Raises:
        DataError: There is none of that name.
    """
    if isinstance(outcome, OutcomeTransform):
        return outcome
    if outcome == "standardize":
        return _Standardize(m=outputs)
    if outcome == "winsorize":
        return Winsorize(m=outputs)
    if outcome == "bilog":
        return ChainedOutcomeTransform(bilog=Bilog(), standardize=_Standardize(m=outputs))
    if outcome == "rank":
        return RankGaussian(outputs)
    if outcome == "none":
        return None
    names = ", ".join(map(repr, OUTCOMES))
    raise DataError(f"outcome: expected one of {names} or an OutcomeTransform, got {outcome!r}")
