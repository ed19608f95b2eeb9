"""Pyro programs under probkit's samplers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

import probkit as pk
from probkit.errors import CapabilityError
from probkit.inference import HMC, MAP, NUTS, SVI, FullRank, ImportanceSampling, MeanField
from probkit.testing import worst_z, z_bound

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")


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


# ------------------------------------------------------- plates and subsampling, every sampler

GROUP = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.int64)
OUTCOME = torch.tensor([0.9, 1.4, 0.7, -0.3, 0.2, 2.5], dtype=torch.float64)
NESTED = {"group": GROUP, "y": OUTCOME}


def nested(group, y=None):
    """mu ~ N(0, 1), effect_g ~ N(mu, 1), y_i ~ N(effect_g(i), 0.5): normal, so known exactly."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(mu, 1.0))
    with pyro.plate("row", len(group)) as rows:
        seen = None if y is None else y[rows]
        pyro.sample("obs", dist.Normal(effect[group[rows]], 0.5), obs=seen)


def exact():
    """Posterior mean [4] and covariance of (mu, effects)."""
    precision = torch.zeros(4, 4, dtype=torch.float64)
    precision[0, 0] = 1.0 + 3.0
    precision[0, 1:] = precision[1:, 0] = -1.0
    one_hot = torch.nn.functional.one_hot(GROUP, 3).double()
    precision[1:, 1:] = torch.diag(1.0 + 4.0 * one_hot.sum(0))
    covariance = torch.linalg.inv(precision)
    return covariance[:, 1:] @ (4.0 * one_hot.T @ OUTCOME), covariance


def joined(draws):
    return torch.cat([draws["mu"][..., None], draws["effect"]], -1)


def nested_model(plate="row"):
    return pk.FromPyro(nested, observed={"y": "obs"}, minibatch_plate=plate)


@pytest.mark.parametrize("plate", [None, "row"])
@pytest.mark.parametrize(
    "sampler",
    [pytest.param(NUTS(80, warmup=60), marks=pytest.mark.slow), HMC(100, warmup=80)],
    ids=["nuts", "hmc"],
)
def test_hamiltonian_samplers_take_plates(sampler, plate):
    post = pk.infer(nested_model(plate), NESTED, sampler, rng=0, chains=16)
    mean, covariance = exact()
    found = joined(post.draws)
    assert worst_z(found.mean(1), mean) < z_bound(8)
    assert worst_z((found - mean).square().mean(1), covariance.diagonal()) < z_bound(8)
    assert post.context.dims["effect"] == ("groups",)


def test_map_takes_plates():
    post = pk.infer(nested_model(), NESTED, MAP(restarts=1), rng=0)
    torch.testing.assert_close(joined(post.draws)[0, 0], exact()[0], rtol=0, atol=1e-5)


def test_importance_sampling_takes_plates():
    post = pk.infer(nested_model(), NESTED, ImportanceSampling(20_000, proposal="prior"), rng=0)
    weights = post.log_weights.flatten().softmax(0)
    values, mean = joined(post.draws)[0], exact()[0]
    error = (weights[:, None].square() * (values - mean).square()).sum(0).sqrt()
    assert float(((weights @ values - mean) / error).abs().max()) < z_bound(4)


@pytest.mark.slow
@pytest.mark.parametrize("guide", [MeanField(), FullRank()], ids=["mean-field", "full-rank"])
def test_variational_inference_takes_minibatches(guide):
    """Rows in batches of two: the optimum of the bound is known for normal posteriors."""
    sampler = SVI(steps=1500, batch_size=2, lr=0.02)
    post = pk.infer(nested_model(), NESTED, sampler, guide=guide, rng=0)
    draws = joined(post.sample(4000, rng=1))
    mean, covariance = exact()
    variance = covariance.diagonal()
    if isinstance(guide, MeanField):
        variance = 1.0 / torch.linalg.inv(covariance).diagonal()
    # Gradients of batches keep the optimum trembling by some hundredths.
    assert float(((draws.mean(0) - mean) / variance.sqrt()).abs().max()) < 0.25
    torch.testing.assert_close(draws.var(0), variance, rtol=0.25, atol=0.0)


def test_a_batch_is_weighted_as_the_whole():
    model = nested_model()
    law = MultivariateNormal(*exact())
    values = law.mean
    point = {"mu": values[0], "effect": values[1:]}
    whole = model.log_joint(point, NESTED)
    parts = []
    for i in range(6):
        batch = model.minibatch(NESTED, torch.tensor([i]))
        parts.append(model.log_joint(point, batch.data, scale=batch.scale))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


# ----------------------------------------------------------------------------- improper priors


def flat(y=None):
    """A flat prior on a mean and on log sd: the posterior of the mean is Student's t."""
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("three", 3):
        offset = pyro.sample("offset", dist.ImproperUniform(constraints.positive, (), ()))
    pyro.factor("offsets", -offset.sum())
    pyro.sample("obs", dist.Normal(mean, 1.0).expand([4]).to_event(1), obs=y)


def test_improper_uniform_sites_have_starts_but_no_draws():
    model = pk.FromPyro(flat)
    data = {"y": torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)}
    sites = model.sites(data)
    assert {name: site.shape for name, site in sites.items()} == {"mean": (), "offset": (3,)}
    assert sites["offset"].dims == ("three",)
    post = pk.infer(model, data, HMC(120, warmup=80), rng=0, chains=16)
    # N(1, 1 / 4), and three Exponential(1).
    mean, offset = post.draws["mean"], post.draws["offset"]
    assert worst_z(mean.mean(1), 1.0) < z_bound(5)
    assert worst_z((mean - 1).square().mean(1), 0.25) < z_bound(5)
    assert worst_z(offset.mean(1), 1.0) < z_bound(5)
    with pytest.raises(CapabilityError, match="improper prior .ImproperUniform. at 'mean', 'off"):
        model.sample_prior(3, rng=0)


def test_an_observation_that_was_freed_is_not_taken_for_an_unobserved_one():
    def location(x, y=None):
        mu = pyro.sample("mu", dist.Normal(x[0], 1.0))
        with pyro.plate("row", 2):
            pyro.sample("obs", dist.Normal(mu + x, 1.0), obs=y)

    x = torch.zeros(2, dtype=torch.float64)
    model = pk.FromPyro(location, observed={"y": "obs"}, inputs={"x": x})
    model.sites({"x": x, "y": torch.ones(2, dtype=torch.float64)})  # the data is gone at once
    assert set(model.sites({"x": x, "y": None})) == {"mu", "obs"}
    values, data = model.sample_dataset(3, rng=0)
    one = model.pick_dataset(data, 1)
    assert one["x"] is x and torch.equal(one["y"], data["y"][1])
    again = model.replace_observed(one, {"mu": values["mu"][:1]}, rng=1)
    assert again["y"].shape == (2,) and not torch.equal(again["y"], one["y"])
