"""How good a learning-curve network is: likelihood and coverage on curves it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curve_prior import CurvePrior
from probkit.models.pfn.curve_task import encode_epochs, encode_metric
from probkit.rng import Rng

__all__ = ["curve_scores"]

CUTS = (10, 20, 40, 80)
LEVELS = (0.5, 0.9)
_ROWS = 250


@torch.no_grad()
def curve_scores(
    network: Callable[..., Tensor],
    borders: Tensor,
    *,
    rng: Rng,
    curves: int = 10_000,
    cuts: Sequence[int] = CUTS,
    prior: CurvePrior | None = None,
) -> dict[str, Mapping[str, float]]:
    """Score a network on fresh curves of the prior, cut after given epochs.

    Args:
        network: Maps encoded epochs and values to logits.
        borders: [bar + 1].
        rng: Seed of the curves; training with seed s uses none of those of another seed.
        curves: How many.
        cuts: Epochs observed.
        prior: Where curves come from; the published prior by default.

    Returns:
        Under "log_likelihood" the mean over curves of the mean log density of later epochs, by
        cut; under "standard_error" its error; under "coverage 0.5" and "coverage 0.9" the share of
        later epochs inside the central intervals.
    """
    prior = prior or CurvePrior()
    _, (t, y) = prior.sample_dataset(curves, rng=rng)
    features = encode_epochs(t, prior.horizon)
    found: dict[str, dict[str, float]] = {"log_likelihood": {}, "standard_error": {}}
    found |= {f"coverage {level}": {} for level in LEVELS}
    for cut in cuts:
        scores, ranks = [], []
        for rows in y.split(_ROWS):
            x, query = (
                part.expand(len(rows), -1, -1) for part in features.split([cut, len(t) - cut])
            )
            logits = network(x, encode_metric(rows[:, :cut]), query)
            law = BarDistribution(borders, logits, validate_args=False)
            scores.append(law.log_prob(rows[:, cut:]).double().mean(1))
            ranks.append(law.cdf(rows[:, cut:]))
        score, distance = torch.cat(scores), (torch.cat(ranks) - 0.5).abs()
        found["log_likelihood"][str(cut)] = round(float(score.mean()), 4)
        found["standard_error"][str(cut)] = round(float(score.std()) / curves**0.5, 4)
        for level in LEVELS:
            share = float((distance <= level / 2).double().mean())
            found[f"coverage {level}"][str(cut)] = round(share, 4)
    return dict(found)
