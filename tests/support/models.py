"""Small real models with known answers, for tests of the core."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributions import MultivariateNormal, Normal, constraints

from probkit.distributions import (
    MultiOutputNormal,
    MultiOutputStudentT,
    MultivariateStudentT,
    ScaledMultivariateNormal,
)
from probkit.files import storable
from probkit.model import Model, Site
from probkit.posterior import Context, Evidence, Posterior
from probkit.predictive import Analytic, Empirical, Mixture
from probkit.rng import stream
from probkit.sources import Closed


@storable
@dataclass(frozen=True)
class ConjugateNormal(Model):
    """y_i ~ N(mu, noise_sd^2), mu ~ N(0, prior_sd^2); data: y [observation]."""

    prior_sd: float = 2.0
    noise_sd: float = 1.0

    def sites(self, data):
        return {"mu": Site((), constraints.real)}

    def data_dims(self, data):
        return ("observation",)

    def log_joint(self, values, data, *, scale=1.0):
        prior = Normal(0.0, self.prior_sd).log_prob(values["mu"])
        return prior + scale * self.log_likelihood(values, data)

    def log_likelihood(self, values, data):
        return self.pointwise_log_likelihood(values, data)["y"].sum(-1)

    def pointwise_log_likelihood(self, values, data):
        return {"y": Normal(values["mu"].unsqueeze(-1), self.noise_sd).log_prob(data)}

    def moments(self, data):
        """Posterior mean and standard deviation of mu."""
        precision = self.prior_sd**-2 + len(data) * self.noise_sd**-2
        return data.sum() * self.noise_sd**-2 / precision, torch.as_tensor(precision**-0.5)

    def evidence(self, data):
        """Log density of y under N(0, noise I + prior 11')."""
        n = len(data)
        covariance = self.noise_sd**2 * torch.eye(n) + self.prior_sd**2 * torch.ones(n, n)
        return MultivariateNormal(torch.zeros(n).double(), covariance.double()).log_prob(data)

    def condition(self, data, hyper=None):
        mean, sd = self.moments(data)
        law = Normal(mean, sd.to(mean))
        return Posterior(
            Closed({"mu": law}),
            self,
            Context(data, {}, {"mu": ()}),
            marginals={"mu": law},
            log_evidence=Evidence(self.evidence(data).reshape(1), "exact"),
        )

    def predict(self, post, x, *, site=None, joint=False, groups=None, rng=None):
        law = post.marginals["mu"]
        variance = law.variance + (self.noise_sd**2 if site is None else 0.0)
        return Analytic(Normal(law.mean.expand(x), variance.sqrt().expand(x)))

    def simulate(self, values, x, *, rng):
        noise = torch.randn(
            *values["mu"].shape, x, generator=stream(rng, "noise"), dtype=values["mu"].dtype
        )
        return values["mu"].unsqueeze(-1) + self.noise_sd * noise


@storable
@dataclass(frozen=True)
class TinyProcess(Model):
    """Gaussian process with a unit squared-exponential kernel, its predictive in several forms.

    Data: (X [n, d], y [n] or [n, output]). ``form`` is "normal", "student" (degrees of freedom
    4 + n), "mixture" (three scales), "amplitude mixture" (the same law, one factor), "t mixture" or
    "draws" (exact joint draws, the same for every X of one shape).
    """

    form: str = "normal"
    noise: float = 0.1
    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    members: int = 64

    def sites(self, data):
        return {}

    def condition(self, data, hyper=None):
        return Posterior(Closed(), self, Context(data))

    def moments(self, data, x, noisy):
        """Mean [*batch, q, output] and covariance [*batch, q, q] at x [*batch, q, d]."""
        inputs, y = data[0], data[1].reshape(len(data[0]), -1)
        gram = _kernel(inputs, inputs) + self.noise * torch.eye(len(inputs)).to(inputs)
        cross = _kernel(x, inputs)
        mean = cross @ torch.linalg.solve(gram, y)
        covariance = _kernel(x, x) - cross @ torch.linalg.solve(gram, cross.mT)
        jitter = 1e-8 + (self.noise if noisy else 0.0)
        return mean, covariance + jitter * torch.eye(x.shape[-2]).to(x)

    def df(self, data):
        return 4.0 + len(data[0])

    def predict(self, post, x, *, site=None, joint=False, groups=None, rng=None):
        data = post.context.data
        mean, covariance = self.moments(data, x, noisy=site is None)
        tril = torch.linalg.cholesky(covariance)
        single = data[1].ndim == 1
        if self.form == "normal":
            law = MultiOutputNormal(mean, tril)
            return Analytic(MultivariateNormal(mean[..., 0], scale_tril=tril) if single else law)
        if self.form == "student":
            law = MultiOutputStudentT(self.df(data), mean, tril)
            one = MultivariateStudentT(self.df(data), mean[..., 0], tril)
            return Analytic(one if single else law)
        if self.form == "draws":
            noise = torch.randn(
                self.members, *mean.shape, generator=stream(rng, "members"), dtype=x.dtype
            )
            values = mean + tril @ noise
            return Empirical(values[..., 0] if single else values)
        scales = torch.tensor(self.scales, dtype=x.dtype).reshape(-1, *[1] * tril.ndim)
        mean, tril = mean.expand(len(self.scales), *mean.shape), scales * tril
        logs = torch.tensor(self.weights, dtype=x.dtype).log()
        if self.form == "t mixture":
            df = torch.tensor([3.0, 5.0, 9.0]).to(x).reshape(-1, *[1] * (tril.ndim - 3))
            one = MultivariateStudentT(df, mean[..., 0], tril)
            return Mixture(one if single else MultiOutputStudentT(df, mean, tril), logs)
        if self.form == "amplitude mixture":
            amplitude = scales[..., 0, 0].expand(tril.shape[:-2])
            one = ScaledMultivariateNormal(mean[0, ..., 0], tril[0] / self.scales[0], amplitude)
            law = MultiOutputNormal(mean[0], tril[0] / self.scales[0], amplitude)
            return Mixture(one if single else law, logs)
        if single:
            return Mixture(MultivariateNormal(mean[..., 0], scale_tril=tril), logs)
        return Mixture(MultiOutputNormal(mean, tril), logs)


def _kernel(a, b):
    squares = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
    return torch.exp(-0.5 * squares)


def normal_data(n=12, seed=3):
    """y [observation] near 1.5."""
    return 1.5 + torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process_data(n=6, outputs=0):
    """X [n, 2] in the unit square and y [n] (or [n, outputs]), smooth functions of it."""
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = torch.sin(3 * x[:, 0]) + x[:, 1]
    if not outputs:
        return x, y
    return x, torch.stack([(k + 1) * y + math.sin(k) for k in range(outputs)], -1)
