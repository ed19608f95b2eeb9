"""Diamond prices: Y ~ N(Intercept + Xc b, sigma), Xc the centred columns 2, ..., K of X.

b ~ N(0, 1), Intercept ~ t3(8, 10), sigma ~ half-t3(0, 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values


class Diamonds(Model):
    """The log joint by sufficient sums: centred columns do not see the intercept."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "b": Site((data["x"].shape[1],), constraints.real, ("column",)),
            "Intercept": Site((), constraints.real),
            "sigma": Site((), constraints.positive),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        b, intercept, sigma = values["b"], values["Intercept"], values["sigma"]
        y, rows = data["y"], len(data["y"])
        prior = Normal(double(0.0), 1.0).log_prob(b).sum(-1)
        prior = prior + StudentT(double(3.0), 8.0, 10.0).log_prob(intercept)
        prior = prior + StudentT(double(3.0), 0.0, 10.0).log_prob(sigma)
        away = ((b - data["fit"]) @ data["root"].mT).square().sum(-1)
        away = away + rows * (intercept - y.mean()).square()
        return prior - 0.5 * (data["rest"] + away) / sigma.square() - rows * sigma.log()


def program(x: Tensor, y: Tensor, **sums: Tensor) -> None:
    three = x.new_tensor(3.0)
    b = pyro.sample("b", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(three, 8.0, 10.0))
    # Half a t law: twice its density on the positive half, a constant.
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.factor("sigma prior", dist.StudentT(three, 0.0, 10.0).log_prob(sigma))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    x, y = double(stored["X"])[:, 1:], double(stored["Y"])
    x = x - x.mean(0)
    # The least squares fit, what it leaves, and the triangular factor of the columns.
    fit = torch.linalg.lstsq(x, (y - y.mean())[:, None]).solution[:, 0]
    rest = (y - y.mean() - x @ fit).square().sum()
    return {"x": x, "y": y, "fit": fit, "rest": rest, "root": torch.linalg.qr(x).R}


DIAMONDS = Case("diamonds", Diamonds(), program, _data, options={"dense": True})
