"""GARCH(1, 1): y_t ~ N(mu, h_t), h_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 h_{t-1}^2.

Flat priors on alpha0 > 0, 0 < alpha1 < 1, 0 < beta1 < 1 - alpha1; h_1 is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values


def _recursion(shocks: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """Solve v_t = shocks_{t-1} + decay v_{t-1} in log2(T) doublings.

    Args:
        shocks: [*batch, T - 1].
        decay: [*batch].
        first: v_1, a scalar.

    Returns:
        [*batch, T].
    """
    value = torch.cat([first.expand(*shocks.shape[:-1], 1), shocks], -1)
    power, reach = decay[..., None], 1
    while reach < value.shape[-1]:
        # value_t holds the shocks of the last `reach` steps; those before them come from t - reach.
        earlier = torch.nn.functional.pad(value[..., :-reach], (reach, 0))
        value = value + power * earlier
        power, reach = power.square(), 2 * reach
    return value


class Garch(Model):
    """alpha1, beta1 and what they leave of one are a point of the simplex, flat in its measure."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "mu": Site((), constraints.real),
            "alpha0": Site((), constraints.positive),
            "shares": Site((3,), constraints.simplex, ("share",)),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        mu, alpha1, beta1 = values["mu"], values["shares"][..., 0], values["shares"][..., 1]
        y = data["y"]
        shocks = values["alpha0"][..., None] + alpha1[..., None] * (
            (y[:-1] - mu[..., None]).square()
        )
        variance = _recursion(shocks, beta1, data["sigma1"].square())
        return Normal(mu[..., None], variance.sqrt()).log_prob(y).sum(-1)


def program(sigma1: Tensor, y: Tensor) -> None:
    real, positive = (
        dist.ImproperUniform(support, (), ())
        for support in (constraints.real, constraints.positive)
    )
    mu = pyro.sample("mu", real)
    alpha0 = pyro.sample("alpha0", positive)
    alpha1 = pyro.sample("alpha1", dist.Uniform(sigma1.new_zeros(()), 1.0))
    share = pyro.sample("share", dist.Uniform(sigma1.new_zeros(()), 1.0))
    beta1 = pyro.deterministic("beta1", share * (1 - alpha1))
    # Flat in beta1: the share's density takes the Jacobian d beta1 / d share.
    pyro.factor("flat", torch.log1p(-alpha1))
    variances = [sigma1.square()]
    for shock in (alpha0 + alpha1 * (y[:-1] - mu).square()).unbind():
        variances.append(torch.addcmul(shock, beta1, variances[-1]))
    variance = torch.stack(torch.broadcast_tensors(*variances))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"sigma1": double(stored["sigma1"]), "y": double(stored["y"])}


def _quantities(draws: Values) -> dict[str, Tensor]:
    found = {"mu": draws["mu"], "alpha0": draws["alpha0"]}
    if "shares" in draws:
        return {**found, "alpha1": draws["shares"][..., 0], "beta1": draws["shares"][..., 1]}
    beta1 = draws["share"] * (1 - draws["alpha1"])
    return {**found, "alpha1": draws["alpha1"], "beta1": beta1}


GARCH = Case("garch", Garch(), program, _data, _quantities)
