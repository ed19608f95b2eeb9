"""Whether a study's surrogate knows what it does not know: predictions of trials left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probkit.bo.asking import fit_surrogate
from probkit.bo.observations import Observations
from probkit.errors import DataError
from probkit.rng import scope, stream

if TYPE_CHECKING:
    import pandas as pd
    from botorch.posteriors.posterior import Posterior

    from probkit.bo.study import Study

__all__ = ["Calibration", "cross_validate"]

_DRAWS = 4096


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predictions of trials by surrogates that were fitted without them, noise included.

    Attributes:
        names: Names of the outcomes.
        values: What was told ``[trial, outcome]``, in the user's orientation.
        mean: Predictive means ``[trial, outcome]``.
        sd: Predictive standard deviations ``[trial, outcome]``.
        pit: Predictive probability of a value below the one told ``[trial, outcome]``: uniform
            where the surrogate is calibrated.
    """

    names: tuple[str, ...]
    values: Tensor
    mean: Tensor
    sd: Tensor
    pit: Tensor

    def coverage(self, level: float = 0.9) -> dict[str, float]:
        """Return the share of told values inside the central interval of that probability.

        Raises:
            DataError: ``level`` outside (0, 1).
        """
        if not 0 < level < 1:
            raise DataError(f"coverage: expected a level in (0, 1), got {level!r}")
        inside = ((self.pit - 0.5).abs() <= level / 2).double().mean(0)
        return dict(zip(self.names, inside.tolist(), strict=True))

    def summary(self, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> pd.DataFrame:
        """Return root mean squared error, mean negative log density and coverage, by outcome.

        The density is that of the normal law with the predictive mean and standard deviation.
        """
        import pandas as pd

        z = (self.values - self.mean) / self.sd
        nll = 0.5 * z.square() + self.sd.log() + 0.5 * math.log(2 * math.pi)
        columns = {
            "trials": [len(self.values)] * len(self.names),
            "RMSE": (self.values - self.mean).square().mean(0).sqrt().tolist(),
            "NLL": nll.mean(0).tolist(),
        }
        for level in levels:
            columns[f"{level:.0%} coverage"] = list(self.coverage(level).values())
        return pd.DataFrame(columns, index=pd.Index(self.names, name="outcome"))


def cross_validate(study: Study, *, folds: int | None = None) -> Calibration:
    """Leave trials out, fit the surrogate to the others, and predict those left out.

    The surrogate is fitted anew for each fold, hyper-parameters and all.

    Args:
        study: With at least three complete trials.
        folds: Number of groups, dealt out in turn; None leaves out one trial at a time.

    Raises:
        DataError: Too few trials, or ``folds`` out of range.
    """
    seen = study.observations()
    rows = seen.told.nonzero()[:, 0]
    if len(rows) < 3:
        raise DataError(f"calibration needs at least 3 complete trials, got {len(rows)}")
    folds = len(rows) if folds is None else folds
    if isinstance(folds, bool) or not 2 <= folds <= len(rows):
        raise DataError(f"folds: expected a number in [2, {len(rows)}], got {folds!r}")
    mean, sd = torch.empty_like(seen.Y[rows]), torch.empty_like(seen.Y[rows])
    pit = torch.empty_like(mean)
    for fold in range(folds):
        out = torch.arange(fold, len(rows), folds)
        with torch.no_grad():
            part = _predict(study, seen, rows[out], fold)
        mean[out], sd[out], pit[out] = part
    signs = study.outcomes.signs
    return Calibration(
        names=study.outcomes.names,
        values=seen.Y[rows] * signs,
        mean=mean * signs,
        sd=sd,
        pit=torch.where(signs > 0, pit, 1 - pit),
    )


def _predict(
    study: Study, seen: Observations, left_out: Tensor, fold: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and PIT ``[row, outcome]`` of rows that a new fit has not seen."""
    keep = torch.ones(len(seen.Y), dtype=torch.bool)
    keep[left_out] = False
    rest = Observations(
        X=seen.X[keep],
        Y=seen.Y[keep],
        Yvar=None if seen.Yvar is None else seen.Yvar[keep],
        told=seen.told[keep],
        pending=seen.pending,
        visited=seen.visited,
    )
    with torch.enable_grad():
        model = fit_surrogate(
            rest,
            study.space,
            study.settings,
            study._evidence(),
            outcomes=study.outcomes,
            key=("calibration", len(seen.Y), fold),
        )
    known = study.settings.noise == "none" or seen.Yvar is not None
    posterior = model.posterior(seen.X[left_out][:, None, :], observation_noise=not known)
    mean, variance = posterior.mean[:, 0], posterior.variance[:, 0]
    extra = torch.zeros_like(variance) if seen.Yvar is None else seen.Yvar[left_out]
    sd = (variance + extra).clamp_min(1e-300).sqrt()
    rng = stream(study.settings.seed, "pit", len(seen.Y), fold)
    return mean, sd, _pit(posterior, seen.Y[left_out], extra, rng)


def _pit(posterior: Posterior, Y: Tensor, extra: Tensor, rng: torch.Generator) -> Tensor:
    """Predictive probability of values below ``Y`` ``[row, outcome]``.

    In closed form for Gaussians; from draws, smoothed by known noise, for all other laws.
    """
    from botorch.posteriors.gpytorch import GPyTorchPosterior

    if isinstance(posterior, GPyTorchPosterior):
        variance = (posterior.variance[:, 0] + extra).clamp_min(1e-300)
        return torch.special.ndtr((Y - posterior.mean[:, 0]) / variance.sqrt())
    with scope(rng=rng):
        draws = posterior.rsample(torch.Size([_DRAWS]))[:, :, 0]
        draws = draws + extra.sqrt() * torch.randn_like(draws)
    below = (draws < Y).double().sum(0) + 0.5 * (draws == Y).double().sum(0)
    return (below + 0.5) / (_DRAWS + 1)
