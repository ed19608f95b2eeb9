"""Predictives of a switching autoregression: one step ahead, states, and whole futures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from probkit.errors import DataError
from probkit.inference.message_passing import HMMFilter
from probkit.model import Values
from probkit.models.arphmm.lagged import Lagged
from probkit.models.arphmm.simulation import continue_paths
from probkit.numerics import safe_cholesky
from probkit.predictive import Analytic, Empirical, Mixture
from probkit.rng import Rng, stream

__all__ = ["flat_draws", "future", "one_step_ahead", "state_law"]


def flat_draws(posterior: Any) -> dict[str, Tensor]:
    """Return all draws of a posterior [chain * draw, *site].

    Raises:
        DataError: It holds no draws.
    """
    draws = posterior.draws
    if not draws:
        raise DataError("expected a posterior with draws or a point estimate, got none")
    return {name: value.flatten(0, 1) for name, value in draws.items()}


def one_step_ahead(values: Values, found: HMMFilter, rows: Lagged) -> Mixture:
    """Law of y_t given y_1, ..., y_(t-1): a mixture over draws and states, by predicted weights.

    Args:
        values: Draws [draw, *site].
        found: The filter of one sequence [draw, 1, T].
        rows: The rows of that sequence.

    Returns:
        A mixture over [T, feature]; its components are [draw * K, T].
    """
    x = rows.design[0, :, : rows.regressors]
    draws, states, features, _ = values["weights"].shape
    mean = torch.einsum("skdp,tp->sktd", values["weights"], x)
    factor, _ = safe_cholesky(values["covariance"])
    steps = len(x)
    shape = (draws * states, steps, features, features)
    factor = factor[:, :, None].expand(draws, states, steps, features, features).reshape(shape)
    dist = MultivariateNormal(mean.flatten(0, 1), scale_tril=factor, validate_args=False)
    weights = found.predicted[:, 0].movedim(-1, 1).flatten(0, 1).log() - math.log(draws)
    return Mixture(dist, weights, dims=("time", "feature"))


def state_law(probs: Tensor) -> Analytic:
    """Law of the states of one sequence, averaged over draws [draw, T, K]."""
    mean = probs.mean(0)
    return Analytic(Categorical(probs=mean / mean.sum(-1, keepdim=True)), dims=("time",))


def future(
    values: Values,
    filtered: Tensor,
    history: Tensor,
    steps: int,
    *,
    paths: int,
    rng: Rng,
) -> tuple[Empirical, Tensor]:
    """Draw what follows the end of one sequence.

    Args:
        values: Draws [draw, *site].
        filtered: p(z_T | y) of each draw [draw, K].
        history: The last L values [lag, feature], oldest first.
        steps: Number of steps ahead.
        paths: Number of paths, spread evenly over the draws.
        rng: Seed or generator.

    Returns:
        The paths as a predictive over [step, feature], and their states [path, step].
    """
    generator = stream(rng, "future", device=history.device)
    draws = len(filtered)
    which = torch.arange(paths, device=history.device) % draws
    state = torch.multinomial(filtered[which], 1, generator=generator)[:, 0]
    own = (
        {name: value[which] for name, value in values.items()}
        if draws > 1
        else {name: value[0] for name, value in values.items()}
    )
    y, states = continue_paths(
        own, history.expand(paths, *history.shape), state, steps, rng=generator
    )
    return Empirical(y, dims=("step", "feature")), states
