"""A mixture of two normals: y ~ theta N(mu1, s1) + (1 - theta) N(mu2, s2), mu1 < mu2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import Beta, HalfNormal, Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values


class Mixture(Model):
    """Means as a first one and a gap above it; each observation summed over its component."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "low": Site((), constraints.real),
            "gap": Site((), constraints.positive),
            "sigma": Site((2,), constraints.positive, ("component",)),
            "theta": Site((), constraints.unit_interval),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        low, sigma, theta = values["low"], values["sigma"], values["theta"]
        two, five = double(2.0), double(5.0)
        mu = torch.stack([low, low + values["gap"]], -1)
        prior = Normal(0.0, two).log_prob(mu).sum(-1) + HalfNormal(two).log_prob(sigma).sum(-1)
        prior = prior + Beta(five, five).log_prob(theta)
        first, second = (
            Normal(mu[..., k, None], sigma[..., k, None]).log_prob(data["y"]) for k in range(2)
        )
        total = torch.logaddexp(
            theta.log()[..., None] + first, torch.log1p(-theta)[..., None] + second
        )
        return prior + total.sum(-1)


def program(y: Tensor) -> None:
    two, five = y.new_tensor(2.0), y.new_tensor(5.0)
    order = dist.ImproperUniform(pyro_constraints.ordered_vector, (), (2,))
    mu = pyro.sample("mu", order)
    pyro.factor("mu prior", dist.Normal(0.0, two).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(two).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(five, five))
    share = dist.Categorical(probs=torch.stack([theta, 1 - theta], -1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(mu, sigma)), obs=y)


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": double(stored["y"])}


def _quantities(draws: Values) -> dict[str, Tensor]:
    mu = draws.get("mu")
    if mu is None:
        mu = torch.stack([draws["low"], draws["low"] + draws["gap"]], -1)
    return {"mu": mu, "sigma": draws["sigma"], "theta": draws["theta"]}


MIXTURE = Case("low_dim_gauss_mix", Mixture(), program, _data, _quantities)
