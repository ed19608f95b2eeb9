"""State-space models: densities against simulation, proposals, data checks, parameters."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.distributions import Gamma, MultivariateNormal, Normal, Uniform

from probkit import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference.smc import ParticleFilter
from probkit.models.state_space import (
    DiscreteHMM,
    LinearGaussian,
    StateSpaceModel,
    StochasticVolatility,
)
from probkit.models.state_space.normals import standard_normal

PLANE = LinearGaussian(
    [[0.8, 0.3], [-0.2, 0.6]],
    [[0.5, 0.1], [0.1, 0.4]],
    [[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]],
    [[0.3, 0.05, 0.0], [0.05, 0.2, 0.0], [0.0, 0.0, 0.6]],
)
HMM = DiscreteHMM([0.6, 0.4], [[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
SV = StochasticVolatility(0.9, 0.4, 0.7)


def test_stationary_law_stays():
    mean, cov = PLANE.initial_law
    A = PLANE.transition
    assert torch.allclose(A @ cov @ A.mT + PLANE.transition_cov, cov, atol=1e-12)
    assert mean.tolist() == [0.0, 0.0]


def test_linear_gaussian_densities():
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 4, 2, generator=g).double().unbind(0)
    y = torch.randn(3, generator=g).double()
    law = MultivariateNormal(old @ PLANE.transition.mT, PLANE.transition_cov)
    assert torch.allclose(PLANE.log_transition(1, old, new, None), law.log_prob(new))
    law = MultivariateNormal(*PLANE.initial_law)
    assert torch.allclose(PLANE.log_transition(0, old, new, None), law.log_prob(new))
    law = MultivariateNormal(new @ PLANE.observation.mT, PLANE.observation_cov)
    assert torch.allclose(PLANE.log_observation(y, new), law.log_prob(y))
    y[1] = math.nan
    there = torch.tensor([0, 2])
    mean = (new @ PLANE.observation.mT)[:, there]
    law = MultivariateNormal(mean, PLANE.observation_cov[there][:, there])
    assert torch.allclose(PLANE.log_observation(y, new), law.log_prob(y[there]))
    assert PLANE.log_observation(y * math.nan, new).tolist() == [0.0] * 4


def test_guided_proposal_is_the_conditional():
    """p(new | old) p(y | new) = p(new | old, y) p(y | old), for every new."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(1, 2, generator=g).double().expand(5, 2)
    new = torch.randn(5, 2, generator=g).double()
    y = torch.randn(4, 3, generator=g).double()
    y[2, 0] = math.nan
    for t in (0, 1, 2):
        ratio = (
            PLANE.log_transition(t, old, new, y)
            + PLANE.log_observation(y[t], new)
            - PLANE.log_proposal(t, old, new, y)
        )
        assert torch.allclose(ratio, ratio[:1].expand(5), atol=1e-10)


@pytest.mark.parametrize("model", [PLANE, HMM, SV], ids=["plane", "hmm", "sv"])
def test_bounds_are_reached_but_not_passed(model):
    states, _ = model.simulate_path(50, 200, rng=0)
    for t in (0, 1):
        old, new = states[:, 0], states[:, t]
        bound = float(model.log_transition_bound(t, None))
        found = float(model.log_transition(t, old, new, None).max())
        assert bound - 0.5 < found <= bound + 1e-12


def z_scores(samples, expected):
    return (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)


def test_simulation_agrees_with_the_laws():
    states, y = PLANE.simulate_path(3, 20000, rng=0)
    last, before = states[:, 2], states[:, 1]
    residual = last - before @ PLANE.transition.mT
    products = residual.unsqueeze(-1) * residual.unsqueeze(-2)
    assert float(z_scores(products, PLANE.transition_cov).abs().max()) < 4
    noise = y[:, 2] - last @ PLANE.observation.mT
    products = noise.unsqueeze(-1) * noise.unsqueeze(-2)
    assert float(z_scores(products, PLANE.observation_cov).abs().max()) < 4
    states, y = HMM.simulate_path(2, 20000, rng=0)
    moved = ((states[:, 0] == 0) & (states[:, 1] == 1)).double()
    assert abs(float(z_scores(moved, 0.06))) < 4
    seen = ((states[:, 1] == 1) & (y[:, 1] == 2)).double()
    assert abs(float(z_scores(seen, 0.8 * (0.6 * 0.1 + 0.4 * 0.7)))) < 4
    states, y = SV.simulate_path(2, 20000, rng=0)
    assert stats.kstest(states[:, 1].numpy(), "norm", (0, 0.4 / (1 - 0.81) ** 0.5)).pvalue > 1e-3
    scaled = y[:, 1] / (0.7 * (states[:, 1] / 2).exp())
    assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-3


def test_volatility_densities():
    old, new = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.1, 0.2]).double()
    assert torch.allclose(
        SV.log_transition(1, old, new, None), Normal(0.9 * old, 0.4).log_prob(new)
    )
    law = Normal(0.0, 0.7 * (new / 2).exp())
    y = torch.tensor(1.3).double()
    assert torch.allclose(SV.log_observation(y, new), law.log_prob(y))
    assert SV.log_observation(y * math.nan, new).tolist() == [0.0, 0.0]


def test_normals_in_bulk():
    g = torch.Generator().manual_seed(0)
    options = {"rng": g, "dtype": torch.float64, "device": torch.device("cpu")}
    bulk = standard_normal((30001,), **options)
    assert bulk.shape == (30001,)
    assert stats.kstest(bulk.numpy(), "norm").pvalue > 1e-3
    half = bulk[: 2 * 15000].reshape(2, -1)
    assert abs(float((half[0] * half[1]).mean())) < 4 / 15000**0.5
    assert float((bulk[1:] * bulk[:-1]).mean()) < 4 / 30000**0.5
    assert standard_normal((3, 2), **options).shape == (3, 2)


# --------------------------------------------------------------------------- parameters


def test_unknown_parameters_become_sites():
    one = torch.ones(()).double()
    prior = {"scale": Gamma(2 * one, one), "persistence": Uniform(-one, one)}
    model = StochasticVolatility(prior=prior)
    sites = model.sites(None)
    assert set(sites) == {"scale", "persistence"} and sites["scale"].shape == ()
    values = model.sample_prior(5, rng=0)
    expected = sum(prior[name].log_prob(values[name]) for name in prior)
    assert torch.allclose(model.log_prior(values), expected)
    fixed = model.at({"scale": values["scale"][0]})
    assert fixed.scale == values["scale"][0] and fixed.sites(None) == {}
    assert model.simulate(values, 7, rng=0).shape == (5, 7)
    assert model.scale == 1.0  # the model itself stays as it is


def test_matrix_parameters():
    law = Normal(torch.zeros(2, 2).double(), 1.0).expand((2, 2))
    model = LinearGaussian(
        PLANE.transition, PLANE.transition_cov, PLANE.observation, PLANE.observation_cov,
        None, torch.eye(2), prior={"transition": law},
    )  # fmt: skip
    assert model.sites(None)["transition"].dims == ("transition_0", "transition_1")
    values = model.sample_prior(3, rng=0)
    assert model.log_prior(values).shape == (3,)
    assert torch.allclose(model.log_prior(values), law.log_prob(values["transition"]).sum((1, 2)))


def test_caches_are_not_carried_over():
    factor = PLANE._transition_factor
    other = PLANE.at({"transition_cov": torch.eye(2).double()})
    assert torch.equal(other._transition_factor, torch.eye(2).double())
    assert PLANE._transition_factor is factor


def test_float32_data_give_float32_particles():
    y = PLANE.simulate_path(4, rng=0)[1][0].float()
    post = infer(PLANE, y, ParticleFilter(20), rng=0)
    assert post.draws["particle"].dtype == torch.float32
    assert post.log_weights.dtype == torch.float64


def test_models_are_saved_with_their_posterior(tmp_path):
    from probkit import load

    y = SV.simulate_path(4, rng=0)[1][0]
    post = infer(SV, y, ParticleFilter(10), rng=0)
    post.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert isinstance(again.model, StochasticVolatility)
    assert torch.equal(again.log_weights, post.log_weights)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DiscreteHMM([0.5, 0.6], torch.eye(2), torch.eye(2)), DataError, "sums to 1.1"),
        (
            lambda: DiscreteHMM([0.5, 0.5], [[0.9, 0.1], [0.4, 0.4]], torch.eye(2)),
            DataError,
            "transition: expected probabilities that sum to one, row 1 sums to 0.8",
        ),
        (
            lambda: DiscreteHMM([0.5, 0.5], torch.eye(2), [[1.2, -0.2], [0.5, 0.5]]),
            DataError,
            "emission: expected probabilities",
        ),
        (lambda: DiscreteHMM([1.0], torch.eye(2), torch.eye(2)), ShapeError, r"\[state, state\]"),
        (lambda: LinearGaussian(1.1, 1.0, 1.0, 1.0), DataError, "give initial_cov"),
        (lambda: LinearGaussian(0.5, -1.0, 1.0, 1.0), DataError, "definite transition_cov"),
        (
            lambda: LinearGaussian(0.5, 1.0, [[1.0, 2.0]], 1.0),
            ShapeError,
            "observation of shape",
        ),
        (lambda: StochasticVolatility(1.0), DataError, "-1 < persistence < 1"),
        (lambda: StochasticVolatility(0.5, scale=0.0), DataError, "scale > 0"),
    ],
)
def test_bad_parameters(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (HMM, [0, 3], DataError, "symbols 0..2 .* got 3 at step 1"),
        (HMM, [0.5], DataError, "got 0.5 at step 0"),
        (HMM, [[0]], ShapeError, r"expected y \[step\]"),
        (PLANE, np.zeros((3, 2)), ShapeError, "feature=3"),
        (
            PLANE,
            [[0.0, math.inf, 0.0]],
            DataError,
            "y must be finite, got inf at step 0, feature 1",
        ),
        (SV, [0.0, -math.inf], DataError, "got -inf at step 1"),
        (SV, np.zeros((2, 2)), ShapeError, r"expected y \[step\]"),
    ],
)
def test_bad_data(model, data, error, message):
    with pytest.raises(error, match=message):
        infer(model, np.asarray(data), ParticleFilter(5), rng=0)


def test_missing_symbols_and_frames():
    y = torch.tensor([0, -1, 2])
    assert HMM.log_observation(y[1], torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    infer(HMM, y, ParticleFilter(5), rng=0)
    frame = pd.DataFrame(np.zeros((3, 3)), columns=["a", "b", "c"])
    post = infer(PLANE, frame, ParticleFilter(5), rng=0)
    assert post.context.coords["feature"] == ["a", "b", "c"]


def test_an_unfinished_subclass_says_what_it_lacks():
    class Half(StateSpaceModel):
        prior = {}

    with pytest.raises(CapabilityError, match="Half must define sample_initial"):
        infer(Half(), torch.zeros(2), ParticleFilter(5), rng=0)
