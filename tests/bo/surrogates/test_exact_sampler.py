"""The sampler that takes every member of an ensemble once."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import qExpectedImprovement, qLogExpectedImprovement
from botorch.models import ModelList
from botorch.models.transforms.outcome import Standardize
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.transformed import TransformedPosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.index_sampler import IndexSampler
from gpytorch.distributions import MultivariateNormal

import probkit as pk
from probkit._botorch_ensemble import MemberPosterior
from probkit.bo.surrogates import ExactEnsembleSampler, make_surrogate

# BoTorch recommends the logarithm; here the plain average is what can be checked by hand.
pytestmark = pytest.mark.filterwarnings("ignore:qExpectedImprovement")


BEST = torch.tensor(0.2, dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    options = {"members": 64, "steps": 5, "hidden": (8,)}
    return make_surrogate("ensemble", x, (5 * x).sin(), options=options, rng=0)


def _rows():
    return torch.full((200, 1, 1), 0.43, dtype=torch.float64)


def test_equal_points_have_equal_values(model):
    acquisition = qExpectedImprovement(model, best_f=BEST, sampler=ExactEnsembleSampler())
    values = acquisition(_rows())
    assert float((values - values[0]).abs().max()) <= 1e-12
    members = model.posterior(_rows()[:1]).values.flatten()
    assert float(values[0]) == pytest.approx(float((members - BEST).clamp_min(0).mean()), rel=1e-9)


def test_the_sampler_of_botorch_gives_equal_points_different_values(model):
    """What the exact sampler is for."""
    with pk.scope(rng=0):
        random = qExpectedImprovement(
            model, best_f=BEST, sampler=IndexSampler(torch.Size([64]), seed=0)
        )(_rows())
    assert float(random.std()) > 1e-4


def test_it_is_the_default_and_exact_for_multiples(model):
    acquisition = qLogExpectedImprovement(model, best_f=BEST)
    values = acquisition(_rows())
    assert isinstance(acquisition.sampler, ExactEnsembleSampler)
    assert float((values - values[0]).abs().max()) <= 1e-12
    posterior = model.posterior(_rows()[:2])
    doubled = ExactEnsembleSampler(torch.Size([128]))(posterior)
    once = ExactEnsembleSampler()(posterior)
    assert doubled.shape == (128, 2, 1, 1)
    torch.testing.assert_close(doubled.mean(0), once.mean(0))
    assert torch.equal(once, posterior.values.movedim(-3, 0))


def test_weighted_members_are_taken_in_proportion():
    weights = torch.tensor([0.5, 0.25, 0.2, 0.05]).double()
    values = torch.arange(4.0).double().reshape(1, 4, 1, 1).expand(3, 4, 2, 1)
    posterior = MemberPosterior(values, weights)
    samples = ExactEnsembleSampler(torch.Size([100]), seed=1)(posterior)
    assert samples.shape == (100, 3, 2, 1)
    assert torch.equal(samples, samples[:, :1, :1].expand_as(samples))  # The same members all over.
    counts = torch.bincount(samples[:, 0, 0, 0].long(), minlength=4)
    assert bool(((counts - 100 * weights).abs() <= 1).all())
    again = ExactEnsembleSampler(torch.Size([100]), seed=1)(posterior)
    assert torch.equal(samples, again)
    torch.testing.assert_close(posterior.mean, (values * weights[:, None, None]).sum(-3))
    deviation = (values - posterior.mean.unsqueeze(-3)).square()
    torch.testing.assert_close(posterior.variance, (deviation * weights[:, None, None]).sum(-3))


def test_transformed_ensembles_are_sampled_member_by_member():
    values = torch.randn(5, 8, 2, 1, generator=torch.Generator().manual_seed(0)).double()
    posterior = TransformedPosterior(MemberPosterior(values), lambda draws: draws.exp())
    sampler = get_sampler(posterior, torch.Size([8]), seed=0)
    assert torch.equal(sampler(posterior), values.exp().movedim(-3, 0))
    transform = Standardize(1)
    transform(torch.tensor([[1.0], [3.0], [8.0]]).double())
    scaled = transform.untransform_posterior(MemberPosterior(values))
    expected = transform.untransform(values)[0].movedim(-3, 0)
    torch.testing.assert_close(ExactEnsembleSampler()(scaled), expected)


def test_ensembles_and_processes_go_together(model):
    x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    both = ModelList(model, make_surrogate("gp", x, x.cos(), rng=0))
    posterior = both.posterior(x[:3])
    with pk.scope(rng=0):
        samples = get_sampler(posterior, torch.Size([64]), seed=0)(posterior)
    assert samples.shape == (64, 3, 2)


def test_other_posteriors_are_refused():
    law = GPyTorchPosterior(MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(pk.CapabilityError, match="expected an EnsemblePosterior, got GPyTorchP"):
        ExactEnsembleSampler()(law)
