"""Direct: closed forms, given and inferred hyper-parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import ConjugateNormal, normal_data
from torch.distributions import constraints

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
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


def test_draws_are_taken_of_a_variational_fit():
    model, data = problem()
    fit = SVI(steps=5, evidence_draws=2)
    post = pk.infer(model, data, Direct(hyper=fit), rng=0, chains=2)
    assert post.draws["noise_var"].shape == (2, 100)
    assert not torch.equal(*post.draws["noise_var"])
    assert len(post.predict(data[0][:2]).log_weights) == 200
    alone = pk.infer(model, data, Direct(hyper=fit), rng=0)
    assert torch.equal(alone.draws["noise_var"][0], post.draws["noise_var"][0])
    nested = pk.infer(Marginal(model), data, fit, rng=0)
    law = nested.marginals["noise_var"]
    # 100 draws: the largest gap to the distribution function exceeds 0.195 once in 1000 runs.
    order = post.draws["noise_var"][0].sort().values
    steps = torch.arange(1, 101, dtype=torch.float64) / 100
    assert float((law.cdf(order) - steps + 0.005).abs().max()) < 0.195


def test_given_hyper_parameters_may_be_numbers_and_arrays():
    model, data = problem()
    means = [
        pk.infer(model, data, Direct(hyper={"noise_var": value}), rng=0).predict(data[0]).mean
        for value in (0.25, np.array(0.25), torch.tensor(0.25, dtype=torch.float64))
    ]
    assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])
    assert not torch.equal(means[0], pk.infer(model, data, rng=0).predict(data[0]).mean)


def test_given_hyper_parameters_are_checked():
    model, data = problem()
    with pytest.raises(DataError, match=r"hyper\['noise_var'\]: expected a value in .*got -1.0"):
        pk.infer(model, data, Direct(hyper={"noise_var": -1.0}), rng=0)
    with pytest.raises(ShapeError, match=r"hyper\['noise_var'\]: expected shape \(\), got \(2,\)"):
        pk.infer(model, data, Direct(hyper={"noise_var": [0.1, 0.2]}), rng=0)


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


def test_a_guide_goes_to_the_sampler_of_the_hyper_parameters():
    """Importance sampling of hyper-parameters with a fitted guide as proposal."""
    from probkit.inference import FullRank, ImportanceSampling

    model, data = problem()
    model = ScaleMixtureNNGP(model.kernel, learn=("noise_var",))
    fit = pk.infer(Marginal(model), data, SVI(steps=300), guide=FullRank(), rng=0)
    proposal = Fixed(fit.source.guide, fit.source.params[0])
    sampler = Direct(hyper=ImportanceSampling(400))
    post = pk.infer(model, data, sampler, guide=proposal, rng=0)
    assert post.log_weights.shape == (1, 400)
    assert isinstance(post.predict(data[0]), pk.Mixture)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chains": 0}, "chains: expected a whole number"),
        ({"chains": 2.0}, "chains: expected a whole number"),
        ({"callbacks": print}, "callbacks: expected a list of functions"),
    ],
)
def test_bad_options_of_infer_are_named(options, text):
    with pytest.raises(DataError, match=text):
        pk.infer(ConjugateNormal(), normal_data(), Direct(), rng=0, **options)


def test_a_checkpoint_must_be_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(DataError, match="expected a folder"):
        pk.infer(ConjugateNormal(), normal_data(), Direct(), rng=0, checkpoint=path)


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_numbers_of_draws_are_checked(n):
    post = pk.infer(ConjugateNormal(), normal_data(), Direct(), rng=0)
    with pytest.raises(DataError, match="whole number of draws"):
        post.sample(n, rng=0)
    with pytest.raises(DataError, match="whole number of draws"):
        post.predict(2).sample(n, rng=0)
