"""Models small enough that networks learn them within a test."""

from __future__ import annotations

import torch
from torch.distributions import constraints

from probkit.model import Model, Site
from probkit.rng import seed_of, stream

NOISE = 0.25


class NormalMean(Model):
    """mu ~ Normal(0, 1), y_i ~ Normal(mu, 0.25): the posterior is known."""

    version = "normal mean"

    def __init__(self, rows=10):
        self.rows = rows

    def sites(self, data=None):
        return {"mu": Site((), constraints.real)}

    def sample_prior(self, n, *, rng):
        return {"mu": torch.randn(n, generator=stream(rng, "prior"))}

    def simulate(self, values, x, *, rng):
        mu = values["mu"]
        noise = torch.randn(len(mu), self.rows, generator=stream(rng, "noise"))
        return mu[:, None] + NOISE * noise

    def sample_dataset(self, n, *, rng):
        seed = seed_of(rng)
        values = self.sample_prior(n, rng=seed)
        return values, self.simulate(values, None, rng=seed)

    @staticmethod
    def posterior(y):
        """Mean [*batch] and standard deviation of mu given y [*batch, row]."""
        precision = 1 + y.shape[-1] / NOISE**2
        return y.sum(-1) / NOISE**2 / precision, precision**-0.5


class Line(Model):
    """Two correlated latents and one on the positive half-line; rows (x, y) of a noisy line."""

    version = "noisy line"

    def sites(self, data=None):
        return {
            "coef": Site((2,), constraints.real, ("term",)),
            "noise_var": Site((), constraints.positive),
        }

    def sample_prior(self, n, *, rng):
        generator = stream(rng, "prior")
        coef = torch.randn(n, 2, generator=generator)
        noise_var = (0.5 * torch.randn(n, generator=generator) - 2.5).exp()
        return {"coef": coef, "noise_var": noise_var}

    def sample_dataset(self, n, *, rng):
        seed = seed_of(rng)
        values = self.sample_prior(n, rng=seed)
        generator = stream(seed, "rows")
        x = 1.5 * torch.rand(n, 12, 1, generator=generator)
        return values, (x, self.simulate(values, x, rng=seed))

    def simulate(self, values, x, *, rng):
        mean = values["coef"][:, :1] + values["coef"][:, 1:] * x[..., 0]
        noise = torch.randn(mean.shape, generator=stream(rng, "noise"))
        return mean + values["noise_var"].sqrt()[:, None] * noise

    def log_joint(self, values, data, *, scale=1.0):
        x, y = data
        coef, var = values["coef"], values["noise_var"]
        log_var = var.log()
        prior = -0.5 * coef.square().sum() - 0.5 * ((log_var + 2.5) / 0.5).square() - log_var
        rest = y - coef[0] - coef[1] * x[..., 0]
        return prior + scale * (-0.5 * rest.square() / var - 0.5 * log_var).sum()
