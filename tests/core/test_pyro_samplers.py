"""Pyro programs under probkit's samplers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import probkit as pk
from probkit.inference import MAP, ImportanceSampling


def _normal(x, y=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("unit", len(x)):
        pyro.sample("obs", dist.Normal(mean * x, 1.0), obs=y)


def test_importance_sampling_from_the_prior_of_a_program_with_inputs():
    x, y = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.4, 1.1]).double()
    model = pk.FromPyro(_normal, observed=("y",))
    post = pk.infer(model, {"x": x, "y": y}, ImportanceSampling(20_000, proposal="prior"), rng=0)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.eye(2).double() + x[:, None] * x
    ).log_prob(y)
    weights = post.log_weights.flatten().exp()
    error = float(weights.std() / weights.mean()) / len(weights) ** 0.5
    assert abs(float(post.log_evidence.value) - float(exact)) < 4 * error


def test_map_starts_a_parameter_at_the_value_that_the_program_gives():
    def two_optima(y=None):
        start = torch.tensor(-1.5, dtype=torch.float64)
        centre = pyro.param("centre", start, constraint=constraints.interval(-2.0, 2.0))
        pyro.sample("obs", dist.Normal(centre.square(), 0.1), obs=y)

    model = pk.FromPyro(two_optima, observed=("y",))
    data = {"y": torch.tensor(1.0, dtype=torch.float64)}
    post = pk.infer(model, data, MAP(restarts=1), rng=0)
    assert abs(float(post.draws["centre"]) + 1.0) < 1e-4
