"""The support of a posterior: which weights are there, with probabilities."""

from __future__ import annotations

from typing import Any

import scipy.stats
import torch
from torch import Tensor

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError
from probkit.models.sbl.laws import ComplexNormal, WeightLaw
from probkit.posterior import Posterior
from probkit.sources import Closed

__all__ = ["support_mask", "support_probability"]


def support_probability(post: Posterior, threshold: float | None = None) -> Tensor:
    """P(|x_j| > threshold | y) for every weight.

    Pruned weights have probability zero; over several draws of the prior variances the
    probabilities are averaged.

    Args:
        post: A posterior of a sparse model.
        threshold: Size that counts as present; None takes 1e-3 times the largest posterior mean.

    Returns:
        Probabilities of the shape of the weights, float64.

    Raises:
        CapabilityError: The posterior has no law of the weights.
        DataError: The threshold is negative or not finite.

    Example:
        >>> import probkit as pk
        >>> from probkit.models import SparseRegression
        >>> y = torch.tensor([3.0, 0.0, 0.1], dtype=torch.float64)
        >>> post = pk.infer(SparseRegression(torch.eye(3), noise_var=0.01), y, rng=0)
        >>> [round(p, 2) for p in support_probability(post).tolist()][:2]
        [1.0, 0.0]
    """
    law = _law(post)
    single = law.batch_shape.numel() == 1
    mean = law.mean.reshape(-1, *law.event_shape)
    if threshold is None:
        threshold = 1e-3 * float(mean.mean(0).abs().max())
    if not 0 <= threshold < float("inf"):
        raise DataError(f"threshold: expected a finite number >= 0, got {threshold!r}")
    marginal = law.marginal()
    exceeds = _exceedance(marginal, float(threshold)).reshape(-1, *law.event_shape)
    if single:
        return exceeds[0]
    weights = getattr(post.source, "log_weights", None)
    if weights is None:
        return exceeds.mean(0)
    return torch.tensordot(torch.softmax(weights.flatten(), 0).to(exceeds), exceeds, dims=1)


def support_mask(
    post: Posterior, threshold: float | None = None, probability: float = 0.5
) -> Tensor:
    """The weights that exceed ``threshold`` with at least ``probability``, as a boolean mask.

    Raises:
        DataError: ``probability`` is not in (0, 1].
    """
    if not 0 < probability <= 1:
        raise DataError(f"probability: expected a number in (0, 1], got {probability!r}")
    return support_probability(post, threshold) >= probability


def _law(post: Posterior) -> WeightLaw:
    source: Any = post.source
    law = source.joint.get("weights") if isinstance(source, Closed) else None
    if not isinstance(law, WeightLaw):
        raise CapabilityError(
            "the support needs a posterior of the weights in closed form: infer(model, y, rng=0)"
        )
    return law


def _exceedance(law: Any, threshold: float) -> Tensor:
    """P(|x| > threshold); by the point mass where the scale is zero."""
    scale, mean = law.scale, law.mean
    fixed = (mean.abs() > threshold).double()
    safe = torch.where(scale > 0, scale, 1.0)
    if isinstance(law, ComplexNormal):
        ratio = 2 * (threshold / safe).square()
        offset = 2 * (mean.abs() / safe).square()
        tail = scipy.stats.ncx2.sf(ratio.cpu().numpy(), 2, offset.cpu().numpy().clip(1e-300))
        beyond = torch.as_tensor(tail, dtype=torch.float64, device=scale.device)
    else:
        normal = torch.distributions.Normal(mean, safe, validate_args=False)
        high = D.cdf(normal, torch.as_tensor(-threshold).to(mean))
        low = torch.special.ndtr((mean - threshold) / safe)
        beyond = high + low
    return torch.where(scale > 0, beyond, fixed)
