"""Direct: closed forms, given and inferred hyper-parameters."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import ConjugateNormal, normal_data
from torch.distributions import constraints

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError
from probkit.inference import MAP, SVI, Direct, Fixed, MeanField
from probkit.kernels import NNGPKernel
from probkit.marginal import Marginal
from probkit.model import Model, Site
from probkit.models import ScaleMixtureNNGP


def problem():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    return ScaleMixtureNNGP(NNGPKernel(depth=2)), (x, (3 * x[:, 0]).sin())


QUICK = MAP(restarts=1, tolerance=1e-3)


def test_the_closed_form_is_that_of_the_model():
    y = normal_data()
    post = pk.infer(ConjugateNormal(), y, Direct(), rng=0)
    mean, sd = ConjugateNormal().moments(y)
    assert float(post.marginals["mu"].mean) == pytest.approx(float(mean))
    assert float(post.marginals["mu"].stddev) == pytest.approx(float(sd))
    assert post.log_evidence.kind == "exact"


def test_every_chain_is_the_one_closed_form():
    post = pk.infer(ConjugateNormal(), normal_data(), Direct(), rng=0, chains=3)
    assert post.chains == 3 and post.log_evidence.value.shape == (3,)
    assert len(set(post.log_evidence.value.tolist())) == 1


def test_hyper_parameters_are_those_of_the_marginal_model():
    model, data = problem()
    nested = pk.infer(Marginal(model), data, QUICK, rng=4)
    post = pk.infer(model, data, Direct(hyper=QUICK), rng=4)
    assert post.draws.keys() == nested.draws.keys()
    for name, value in nested.draws.items():
        assert torch.equal(post.draws[name], value)
    best = {name: value[0, 0] for name, value in nested.draws.items()}
    direct = pk.infer(model, data, Direct(hyper=best), rng=0)
    x = data[0][:3] + 0.05
    torch.testing.assert_close(post.predict(x).mean, direct.predict(x).mean)
    torch.testing.assert_close(post.log_evidence.value, direct.log_evidence.value)
    assert post.attrs["hyper"] == "MAP" and post.attrs["converged"] is True
    assert not post.is_point_estimate


def test_the_map_of_hyper_parameters_beats_the_values_held():
    model, data = problem()
    marginal = Marginal(model)
    held = model.hyper_values(data)
    post = pk.infer(marginal, data, QUICK, rng=0)
    assert float(post.sample_stats["lp"]) > float(marginal.log_joint(held, data))


def test_several_draws_are_mixed():
    model, data = problem()
    post = pk.infer(model, data, Direct(hyper=QUICK), rng=0, chains=2)
    assert post.log_evidence is None, "an evidence given each draw is none of the model"
    prediction = post.predict(data[0][:2])
    assert isinstance(prediction, pk.Mixture) and len(prediction.log_weights) == 2


def test_the_nested_sampler_warns_as_it_does_alone():
    model, data = problem()
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        post = pk.infer(model, data, Direct(hyper=MAP(restarts=1, max_iter=1)), rng=0)
    assert post.attrs["converged"] is False


def test_a_model_without_evidence_has_no_hyper_parameters_to_infer():
    with pytest.raises(CapabilityError, match=r"ConjugateNormal lacks hyper_sites"):
        pk.infer(ConjugateNormal(), normal_data(), Direct(hyper=MAP()), rng=0)
    with pytest.raises(CapabilityError, match="need a closed-form evidence; ConjugateNormal"):
        Marginal(ConjugateNormal())


def test_a_fit_is_no_draw():
    model, data = problem()
    with pytest.raises(CapabilityError, match="needs a sampler that returns draws"):
        pk.infer(model, data, Direct(hyper=SVI(steps=2, evidence_draws=2)), rng=0)


@pytest.mark.parametrize("wrong", [3, "map", [1.0]])
def test_options_are_checked(wrong):
    with pytest.raises(DataError, match=r"^Direct: expected hyper=None, a mapping"):
        Direct(hyper=wrong)


def test_an_amortised_guide_needs_no_closed_form():
    """A trained guide answers for a model that cannot be conditioned."""

    class Unit(Model):
        def sites(self, data):
            return {"mean": Site((), constraints.real)}

    zero = torch.zeros((), dtype=torch.float64)
    trained = Fixed(MeanField(), {"mean": {"loc": zero + 3.0, "log_scale": zero - 2.0}})
    post = pk.infer(Unit(), torch.zeros(4, dtype=torch.float64), Direct(), guide=trained, rng=0)
    draws = post.sample(4000, rng=1)["mean"]
    sd = math.exp(-2.0)
    assert abs(float(draws.mean()) - 3.0) < 4 * sd / 4000**0.5
