"""Models with exact posteriors and small samplers, importable by worker processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributions import Gamma, MultivariateNormal, Normal, constraints

from probkit.data import take
from probkit.density import initial_values, log_joint_of
from probkit.errors import DataError
from probkit.files import storable
from probkit.model import Batch, Model, Site
from probkit.posterior import make_posterior
from probkit.rng import randn, scope, stream
from probkit.sampler import Sampler, Step
from probkit.sources import Draws
from probkit.unconstrained import Unconstrained


def refuse_nan(x, name):
    """What a model's prepare does with values that are not finite."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        raise DataError(f"{name}: not finite in entry {tuple(bad.nonzero()[0].tolist())}")


@storable
@dataclass(frozen=True)
class LineModel(Model):
    """Bayesian line: y_i ~ N(X_i w, noise^2), w ~ N(0, prior^2 I); data (X [n, d], y [n])."""

    noise: float = 0.5
    prior: float = 1.5
    width: int = 2
    rows: int = 6
    batched: ClassVar[bool] = True

    @property
    def coords(self):
        return {"feature": [f"x{k}" for k in range(self.width)]}

    def sites(self, data):
        return {"w": Site((self.width,), constraints.real, ("feature",))}

    def prepare(self, data):
        refuse_nan(data[0], "X")
        refuse_nan(data[1], "y")
        return data

    def guide(self):
        from probkit.inference import FullRank

        return FullRank()

    def log_prior(self, values):
        return Normal(0.0, self.prior).log_prob(values["w"]).sum(-1)

    def log_joint(self, values, data, *, scale=1.0):
        return self.log_prior(values) + scale * self.log_likelihood(values, data)

    def log_likelihood(self, values, data):
        return self.pointwise_log_likelihood(values, data)["y"].sum(-1)

    def pointwise_log_likelihood(self, values, data):
        mean = (data[0] @ values["w"].unsqueeze(-1)).squeeze(-1)
        return {"y": Normal(mean, self.noise).log_prob(data[1])}

    def sample_prior(self, n, *, rng):
        noise = torch.randn(n, self.width, generator=stream(rng, "prior"), dtype=torch.float64)
        return {"w": self.prior * noise}

    def simulate(self, values, x, *, rng):
        mean = values["w"] @ x.T
        return mean + self.noise * torch.randn(
            mean.shape, generator=stream(rng, "noise"), dtype=mean.dtype
        )

    def sample_dataset(self, n, *, rng):
        root = stream(rng, "pairs")
        values = self.sample_prior(n, rng=root)
        x = torch.randn(self.rows, self.width, generator=root, dtype=torch.float64)
        return values, (x.expand(n, -1, -1), self.simulate(values, x, rng=root))

    def plate_size(self, data):
        return len(data[1])

    def minibatch(self, data, index):
        size = self.plate_size(data)
        return Batch(take(data, index, size), index, size / len(index))

    def exact(self, data):
        """Posterior mean [d], covariance [d, d] and log evidence."""
        x, y = data
        eye = torch.eye(self.width, dtype=x.dtype)
        precision = x.T @ x / self.noise**2 + eye / self.prior**2
        covariance = torch.linalg.inv(precision)
        marginal = self.prior**2 * x @ x.T + self.noise**2 * torch.eye(len(y), dtype=x.dtype)
        law = MultivariateNormal(torch.zeros_like(y), marginal)
        return covariance @ x.T @ y / self.noise**2, covariance, law.log_prob(y)


def line_data(n=8, width=2, seed=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = x @ torch.linspace(-1, 1, width, dtype=torch.float64)
    return x, y + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)


@storable
@dataclass(frozen=True)
class GroupModel(Model):
    """Local means: mu ~ N(0, 1), z_i ~ N(mu, 1), y_i ~ N(z_i, noise^2); data y [unit]."""

    noise: float = 1.0

    def sites(self, data):
        return {
            "mu": Site((), constraints.real),
            "z": Site((len(data),), constraints.real, ("unit",), plate="unit"),
        }

    def log_joint(self, values, data, *, scale=1.0):
        local = Normal(values["mu"], 1.0).log_prob(values["z"])
        local = local + Normal(values["z"], self.noise).log_prob(data)
        return Normal(0.0, 1.0).log_prob(values["mu"]) + scale * local.sum()

    def plate_size(self, data):
        return len(data)

    def minibatch(self, data, index):
        return Batch(data[index], index, len(data) / len(index))

    def exact(self, data):
        """Posterior mean [1 + n] and covariance of (mu, z), and log evidence."""
        n = len(data)
        precision = torch.zeros(n + 1, n + 1, dtype=data.dtype)
        precision[0, 0] = 1.0 + n
        precision[0, 1:] = precision[1:, 0] = -1.0
        precision[1:, 1:] = (1.0 + self.noise**-2) * torch.eye(n, dtype=data.dtype)
        covariance = torch.linalg.inv(precision)
        mean = covariance[:, 1:] @ data / self.noise**2
        marginal = torch.ones(n, n, dtype=data.dtype)
        marginal = marginal + (1.0 + self.noise**2) * torch.eye(n, dtype=data.dtype)
        return mean, covariance, MultivariateNormal(torch.zeros_like(data), marginal).log_prob(data)


@storable
@dataclass(frozen=True)
class RateModel(Model):
    """y_i ~ Exponential(rate), rate ~ Gamma(a, b); data y [n]; posterior Gamma(a + n, b + sum)."""

    a: float = 3.0
    b: float = 2.0

    def sites(self, data):
        return {"rate": Site((), constraints.positive)}

    def log_joint(self, values, data, *, scale=1.0):
        rate = values["rate"]
        likelihood = len(data) * rate.log() - rate * data.sum()
        prior = (self.a - 1) * rate.log() - self.b * rate + self.constant()
        return prior + scale * likelihood

    def constant(self):
        """Log normaliser of the prior."""
        return self.a * math.log(self.b) - math.lgamma(self.a)

    def sample_prior(self, n, *, rng):
        with scope(rng=stream(rng, "prior")):
            return {"rate": Gamma(torch.tensor(self.a).double(), self.b).sample((n,))}

    def sample_dataset(self, n, *, rng):
        values = self.sample_prior(n, rng=rng)
        uniform = torch.rand(n, 5, generator=stream(rng, "y"), dtype=torch.float64)
        return values, -torch.log1p(-uniform) / values["rate"][:, None]

    def exact(self, data):
        return self.a + len(data), self.b + float(data.sum())


@storable
@dataclass(frozen=True)
class Metropolis(Sampler):
    """Random-walk Metropolis; one state carries a block of chains, [chain, size]."""

    draws: int = 50
    size: float = 0.8
    width: int | None = 1
    each: int = 5

    needs = ("sites", "log_joint")

    @property
    def block(self):
        return self.width

    def total(self):
        return -(-self.draws // self.each)

    def _density(self, problem, flat):
        values, log_det = Unconstrained(problem.model.sites(problem.data)).constrain(flat)
        return log_joint_of(problem.model, values, problem.data) + log_det

    def init(self, problem, *, rngs):
        sites = problem.model.sites(problem.data)
        free = Unconstrained(sites)
        start = [initial_values(problem.model, problem.data, sites, 1, rng=g) for g in rngs]
        flat = torch.cat([free.flatten(point) for point in start])
        return {"flat": flat, "log_p": self._density(problem, flat), "drawn": 0}

    def step(self, problem, state, *, rngs):
        free = Unconstrained(problem.model.sites(problem.data))
        flat, log_p = state["flat"], state["log_p"]
        kept = []
        for _ in range(min(self.each, self.draws - state["drawn"])):
            proposal = flat + self.size * randn(rngs, flat.shape[1:], dtype=flat.dtype)
            uniform = torch.cat([torch.rand(1, generator=g, dtype=flat.dtype) for g in rngs])
            new = self._density(problem, proposal)
            accept = uniform.log() < new - log_p
            flat = torch.where(accept[:, None], proposal, flat)
            log_p = torch.where(accept, new, log_p)
            kept.append(flat)
        draws = free.values(torch.stack(kept, 1))
        drawn = state["drawn"] + len(kept)
        return Step(
            {"flat": flat, "log_p": log_p, "drawn": drawn},
            drawn >= self.draws,
            {"values": draws},
            {"lp": float(log_p.mean())},
        )

    def finish(self, problem, state, kept, *, rngs):
        return make_posterior(problem, Draws(kept["values"]))


def same(a: Any, b: Any) -> bool:
    """Whether two posteriors are equal to the last bit."""
    from probkit.fingerprint import digest

    return digest([a.source, a.log_evidence, dict(a.sample_stats)]) == digest(
        [b.source, b.log_evidence, dict(b.sample_stats)]
    )
