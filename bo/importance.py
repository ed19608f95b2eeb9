"""Which parameters matter: variance-based sensitivity of a study's surrogate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.rng import stream

if TYPE_CHECKING:
    import pandas as pd
    from botorch.models.model import Model

    from probkit.bo.study import Study

__all__ = ["sobol_indices"]


def sobol_indices(study: Study, n: int = 1024) -> pd.DataFrame:
    """Return Sobol indices of the surrogate's mean, by parameter and outcome.

    The *first-order* index of a parameter is the share of the variance over the space that it
    explains alone; the *total* index counts its interactions with others as well. Both are
    estimated from two samples A and B, and A with one column of B, by the formulas of Jansen
    ("Analysis of variance designs for model output", Computer Physics Communications 117, 1999).
    Parameters vary evenly over their codes: logarithms where the scale is logarithmic.

    Args:
        study: With at least two complete trials.
        n: Points of each sample; the error falls as its square root.

    Returns:
        One row for each outcome and parameter, columns ``first`` and ``total``. All are zero where
        the surrogate is flat.

    Raises:
        DataError: ``n`` below 2, or too few trials.
    """
    import pandas as pd

    if n < 2:
        raise DataError(f"importance: expected n >= 2 points, got {n}")
    model, space = study.model(), study.space
    rng = stream(study.settings.seed, "importance")
    A, B = (space.random_codes(n, rng=rng) for _ in range(2))
    centre = [_mean(model, space.canonical(X)) for X in (A, B)]
    variance = torch.cat(centre).var(0)
    rows = []
    for k, name in enumerate(space.names):
        mixed = A.clone()
        mixed[:, k] = B[:, k]
        f = _mean(model, space.canonical(mixed))
        total = 0.5 * (centre[0] - f).square().mean(0) / variance
        first = 1 - 0.5 * (centre[1] - f).square().mean(0) / variance
        for m, outcome in enumerate(study.outcomes.names):
            flat = not bool(variance[m] > 0)
            rows.append(
                {
                    "outcome": outcome,
                    "parameter": name,
                    "first": 0.0 if flat else max(0.0, float(first[m])),
                    "total": 0.0 if flat else float(total[m]),
                }
            )
    frame = pd.DataFrame(rows).set_index(["outcome", "parameter"])
    return frame.droplevel("outcome") if len(study.outcomes.names) == 1 else frame


def _mean(model: Model, X: Tensor, chunk: int = 1024) -> Tensor:
    """Mean of the surrogate ``[row, outcome]``."""
    with torch.no_grad():
        return torch.cat([model.posterior(part[:, None, :]).mean[:, 0] for part in X.split(chunk)])
