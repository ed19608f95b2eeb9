"""Gaussian process regression: y ~ MVN(0, alpha^2 exp(-(x - x')^2 / (2 rho^2)) + sigma I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Gamma, HalfNormal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values


class GaussianProcess(Model):
    """The log joint of length scale, amplitude and noise variance."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {name: Site((), constraints.positive) for name in ("rho", "alpha", "sigma")}

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        rho, alpha, sigma = (values[name] for name in ("rho", "alpha", "sigma"))
        prior = Gamma(double(25.0), double(4.0)).log_prob(rho)
        prior = prior + HalfNormal(double(2.0)).log_prob(alpha)
        prior = prior + HalfNormal(double(1.0)).log_prob(sigma)
        x, y = data["x"], data["y"]
        exponent = -0.5 * (x[:, None] - x).square() / rho.square()[..., None, None]
        gram = alpha.square()[..., None, None] * exponent.exp()
        factor = torch.linalg.cholesky(
            gram + torch.diag_embed(sigma[..., None].expand(gram[..., 0].shape))
        )
        white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)[..., 0]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return prior - 0.5 * white.square().sum(-1) - log_det


def program(x: Tensor, y: Tensor) -> None:
    unit = x.new_ones(())
    rho = pyro.sample("rho", dist.Gamma(25 * unit, 4 * unit))
    alpha = pyro.sample("alpha", dist.HalfNormal(2 * unit))
    sigma = pyro.sample("sigma", dist.HalfNormal(unit))
    gram = (alpha * torch.exp(-0.25 * ((x[:, None] - x) / rho).square())).square()
    covariance = gram + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"x": double(stored["x"]), "y": double(stored["y"])}


GAUSSIAN_PROCESS = Case("gp_pois_regr", GaussianProcess(), program, _data)
