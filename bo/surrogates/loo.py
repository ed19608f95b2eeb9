"""Leave-one-out predictive densities of fitted surrogates, without refitting them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.errors import CapabilityError
from probkit.sources import Draws

__all__ = ["loo_log_density", "stacking_weights"]


def loo_log_density(model: Any) -> Tensor:
    """Return log p(y_i | all other rows) [row], outcomes in the units of the fit.

    Of a Gaussian process in closed form (Rasmussen and Williams 2006, equations 5.10 to 5.12), its
    hyper-parameters fixed; of draws by Pareto-smoothed importance sampling (Vehtari, Gelman and
    Gabry 2017).

    Args:
        model: A ``DenseGP`` of one output, or a ``PosteriorSurrogate`` with draws.

    Raises:
        CapabilityError: The surrogate is of another kind.
    """
    if isinstance(model, DenseGP):
        return _of_process(model)
    if isinstance(model, PosteriorSurrogate) and isinstance(model.source.source, Draws):
        return _of_draws(model)
    raise CapabilityError(
        "leave-one-out densities: expected a Gaussian process (gp, gp-paper, gp-exact, ibnn, dkl) "
        f"or draws of a network (hmc, sghmc), got {type(model).__name__}"
    )


def _of_process(model: DenseGP) -> Tensor:
    model.eval()
    inverse, weights = model._factorised()
    precision = inverse.square().sum(0)  # The diagonal of K^-1 = L^-T L^-1.
    deviation = weights[:, 0] / precision  # y_i less its leave-one-out mean.
    half = 0.5 * precision * deviation.square()
    return 0.5 * precision.log() - half - 0.5 * math.log(2 * math.pi)


def _of_draws(model: PosteriorSurrogate) -> Tensor:
    import arviz

    post = model.source
    assert isinstance(post.source, Draws)
    with torch.no_grad():
        table = post.model.pointwise_log_likelihood(post.source.values, post.context.data)
    pointwise = table["y"].flatten(0, 1)
    pointwise = pointwise if pointwise.ndim == 2 else pointwise.flatten(2).sum(-1)
    weights = post.source.log_weights
    base = torch.zeros(len(pointwise)).to(pointwise) if weights is None else weights.flatten()
    ratios = (base[:, None] - pointwise).T.cpu().numpy()  # [row, draw]
    smoothed, _ = arviz.psislw(ratios)
    log_weights = torch.as_tensor(smoothed).to(pointwise)
    return torch.logsumexp(log_weights + pointwise.T, -1)


def stacking_weights(densities: Tensor, iterations: int = 500) -> Tensor:
    """Return the weights [model] of the mixture that predicts left-out rows best.

    Stacking of predictive distributions (Yao, Vehtari, Simpson and Gelman 2018) by
    expectation-maximisation, which climbs the mean log density of the mixture at every step.

    Args:
        densities: Leave-one-out log densities [model, row].
        iterations: Steps.

    Example:
        >>> stacking_weights(torch.tensor([[0.0, 0.0], [-9.0, -9.0]])).round().tolist()
        [1.0, 0.0]
    """
    log_weights = densities.new_full((len(densities),), -math.log(len(densities)))
    for _ in range(iterations):
        shares = torch.softmax(densities + log_weights[:, None], 0)
        log_weights = shares.mean(1).log()
    return log_weights.exp()
