"""Eight schools, non-centred: y_j ~ N(mu + tau z_j, sigma_j)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import HalfCauchy, Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values


class EightSchools(Model):
    """The log joint of mu, tau and the standardised effects z."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "mu": Site((), constraints.real),
            "tau": Site((), constraints.positive),
            "z": Site((len(data["y"]),), constraints.real, ("school",)),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        mu, tau, z = values["mu"], values["tau"], values["z"]
        theta = mu[..., None] + tau[..., None] * z
        five = double(5.0)
        prior = Normal(double(0.0), five).log_prob(mu) + HalfCauchy(five).log_prob(tau)
        local = Normal(double(0.0), 1.0).log_prob(z) + Normal(theta, data["sigma"]).log_prob(
            data["y"]
        )
        return prior + local.sum(-1)


def program(sigma: Tensor, y: Tensor | None = None) -> None:
    zero = sigma.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"sigma": double(stored["sigma"]), "y": double(stored["y"])}


def _quantities(draws: Values) -> dict[str, Tensor]:
    mu, tau = draws["mu"], draws["tau"]
    theta = mu[..., None] + tau[..., None] * draws["z"]
    return {"theta": theta, "mu": mu, "tau": tau}


EIGHT_SCHOOLS = Case("eight_schools", EightSchools(), program, _data, _quantities)
