"""The variational family of the shared variance sigma^2, by the law that it has before the data.

=============  =====================  ====================================================
law            family                 divergence from the law
=============  =====================  ====================================================
inverse gamma  inverse gamma          closed form
point mass     the point mass itself  zero
any other      log-normal             Gauss-Hermite quadrature over log sigma^2, 64 points
=============  =====================  ====================================================
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from probkit import distributions as D
from probkit.errors import DataError
from probkit.models.scale_laws import InverseGamma, LogNormal, OtherLaw, PointMass, ScaleLaw

__all__ = [
    "check_law",
    "expected_precision",
    "fitted_scale",
    "scale_divergence",
    "scale_nodes",
    "start_scale",
]

_NODES = 64
_QUARTILE = 0.6744897501960817  # of the standard normal law


def check_law(law: ScaleLaw) -> None:
    """Refuse a law that gives a log-normal family values outside its support.

    Raises:
        DataError: The support is not the whole of (0, inf).
    """
    if isinstance(law, OtherLaw):
        lower, upper = (float(torch.as_tensor(bound)) for bound in D.support_bounds(law.base))
        if lower > 0 or upper < math.inf:
            raise DataError(
                f"scale: expected a law on all of (0, inf), got {type(law.base).__name__} on "
                f"({lower:g}, {upper:g}); use InverseGamma, Gamma, LogNormal or BurrXII"
            )


def start_scale(law: ScaleLaw, like: Tensor) -> dict[str, Tensor]:
    """Return parameters to start from: the law itself, or the log-normal law of its quartiles."""
    if isinstance(law, PointMass):
        return {}
    if isinstance(law, InverseGamma):
        raw = {"log_concentration": law.concentration.log(), "log_rate": law.rate.log()}
    else:
        levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        low, middle, high = law.icdf(levels).log()
        spread = ((high - low) / (2 * _QUARTILE)).clamp(0.05, 3.0)
        raw = {"loc": middle, "log_scale": spread.log()}
    return {name: value.detach().to(like).clone() for name, value in raw.items()}


def fitted_scale(law: ScaleLaw, params: Any) -> InverseGamma | LogNormal | PointMass:
    """Return the variational law of sigma^2 at ``params``."""
    if isinstance(law, PointMass):
        return law
    if isinstance(law, InverseGamma):
        return InverseGamma(
            params["log_concentration"].exp(), params["log_rate"].exp(), validate_args=False
        )
    return LogNormal(params["loc"], params["log_scale"].exp(), validate_args=False)


def expected_precision(fitted: ScaleLaw) -> Tensor:
    """Return E[1 / sigma^2] under a law that :func:`fitted_scale` gave.

    Example:
        >>> expected_precision(InverseGamma(3.0, 4.0)).item()
        0.75
    """
    if isinstance(fitted, InverseGamma):
        return fitted.concentration / fitted.rate
    if isinstance(fitted, LogNormal):
        return (0.5 * fitted.scale.square() - fitted.loc).exp()
    return 1 / fitted.mean


def scale_divergence(fitted: ScaleLaw, law: ScaleLaw) -> Tensor:
    """Return KL(q(sigma^2) || p(sigma^2)), a scalar.

    Example:
        >>> round(scale_divergence(InverseGamma(3.0, 4.0), InverseGamma(2.0, 1.5)).item(), 12)
        0.316295660562
    """
    if isinstance(fitted, PointMass):
        return torch.zeros_like(fitted.value)
    if type(fitted) is type(law):
        return kl_divergence(fitted, law)
    assert isinstance(fitted, LogNormal)
    nodes, weights = scale_nodes(fitted)
    u = nodes.log()
    return (weights * (fitted.log_prob_of_log(u) - law.log_prob_of_log(u))).sum()


def scale_nodes(fitted: LogNormal) -> tuple[Tensor, Tensor]:
    """Return Gauss-Hermite nodes of a log-normal law and their weights, [node] each.

    Example:
        >>> nodes, weights = scale_nodes(LogNormal(0.0, 0.5))
        >>> round(float(weights @ nodes), 12) == round(float(LogNormal(0.0, 0.5).mean), 12)
        True
    """
    points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    z, w = (torch.as_tensor(part).to(fitted.loc) for part in (points, weights))
    return (fitted.loc + fitted.scale * z).exp(), w / w.sum()
