"""Choosing the number of states and the order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probkit.models.arphmm.lagged import Lagged

__all__ = ["bic", "free_parameters", "held_out_score"]


def free_parameters(model: Any, features: int) -> int:
    """Count free parameters: structural zeros and tied covariances are not counted.

    Example:
        >>> from probkit.models import ARPHMM
        >>> free_parameters(ARPHMM(states=2, order=1), 1)
        9
    """
    k, d = model.states, features
    regressors = 1 + d * model.order
    one = {"full": d * (d + 1) // 2, "diag": d, "shared": d * (d + 1) // 2}[model.cov]
    covariance = one if model.cov == "shared" else k * one
    transition = int(model.mask.sum()) - k
    return (k - 1) + transition + k * d * regressors + covariance


def bic(model: Any, posterior: Any, data: Any = None) -> Tensor:
    """Bayesian information criterion of a fit, -2 log L + p log(number of steps); lower is better.

    Models of different order are comparable only when they explain the same steps: give the
    sequences ``prev`` as long as the largest order.

    Args:
        model: The model.
        posterior: A point estimate, best from ``prior=None`` or a weak prior.
        data: The sequences; None for those that the posterior was fitted to. Log likelihoods
            under different plausibilities are not comparable: leave labels out on all sides.

    Returns:
        [chain].
    """
    rows: Lagged = model.prepare(posterior.context.data if data is None else data)
    log_likelihood = model.log_likelihood(posterior.draws, rows).squeeze(-1)
    steps = torch.log(rows.lengths.sum().to(log_likelihood))
    return -2 * log_likelihood + free_parameters(model, rows.features) * steps


def held_out_score(model: Any, posterior: Any, data: Any) -> Tensor:
    """Mean log density of a value given what came before it, on sequences not fitted to.

    The draws' predictives are averaged before the logarithm is taken. Labels are not used.

    Returns:
        A scalar; higher is better.
    """
    rows: Lagged = model.prepare(data)
    rows = model.prepare(rows.sequences.without_labels())
    each = model.sequence_log_likelihood(posterior.draws, rows)  # [chain, draw, N]
    draws = each.shape[0] * each.shape[1]
    total = torch.logsumexp(each.flatten(0, 1), 0) - torch.log(torch.tensor(float(draws)))
    return total.sum() / rows.usable.sum()
