"""The Distribution Transformer: the prior is an input, and the posterior may be the next one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MixtureSameFamily, MultivariateNormal

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.pfn import (
    DistributionTransformer,
    MixturePriors,
    NormalMixture,
    NormalVariance,
    TransformerShape,
    train_distribution_transformer,
)

GRID = torch.linspace(-10, 10, 4001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


@pytest.fixture(scope="module")
def briefly():
    shape = TransformerShape(32, 2, 4)
    return train_distribution_transformer(
        NormalVariance(), MixturePriors(), shape, steps=64, rows=12, batch=64, rng=0
    )


def exact(prior, y):
    """Posterior density on GRID under any prior, by quadrature."""
    log_p = prior.log_prob(GRID[:, None].float()).double()
    log_p = log_p - 0.5 * len(y) * GRID - 0.5 * y.double().square().sum() * (-GRID).exp()
    density = (log_p - log_p.max()).exp()
    return density / (density.sum() * STEP)


def divergence(density, law):
    log_q = law.log_prob(GRID[:, None].float()).double()
    terms = torch.where(density > 1e-12, density * (density.clamp_min(1e-12).log() - log_q), 0.0)
    return float(terms.sum() * STEP)


@pytest.mark.slow
def test_posteriors_under_priors_chosen_at_inference():
    """Mean KL divergence below a twentieth of a nat, where the prior alone is at half a nat."""
    net = train_distribution_transformer(
        NormalVariance(), MixturePriors(), TransformerShape(48, 2, 4), steps=1500, rows=16, rng=0
    )
    generator = torch.Generator().manual_seed(7)
    priors = MixturePriors().draw(40, rng=generator)
    trained, ignored, chained = [], [], []
    for k in range(40):
        prior = NormalMixture(priors.logits[k], priors.loc[k], priors.scale_tril[k])
        with pk.scope(rng=k):
            latent = prior.sample()
        y = NormalVariance().simulate(latent, 12, rng=generator)
        density = exact(prior, y)
        post = pk.infer(net.with_prior(prior), y, rng=0)
        trained.append(divergence(density, post.marginals["latent"]))
        ignored.append(divergence(density, prior))
        half = pk.infer(net.with_prior(prior), y[:6], rng=0).update(y[6:], rng=0)
        chained.append(divergence(density, half.marginals["latent"]))
    assert sum(trained) / 40 < 0.05
    assert sum(ignored) / 40 > 0.3
    assert sum(chained) / 40 < 0.2  # two steps, each with its own error


def test_an_untrained_network_returns_the_prior_as_it_reads_it(briefly):
    """Layers start as the identity: before training, prior and posterior readings agree."""
    net = train_distribution_transformer(
        NormalVariance(), MixturePriors(), TransformerShape(16, 1, 2), steps=1, rng=0
    )
    prior = MixturePriors().draw(3, rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read, posterior = net.network(prior, torch.ones(3, 5, 1))
    # one step has moved the weights by at most the learning rate
    assert (read.loc - posterior.loc).abs().max() < 0.1


def test_the_order_of_observations_and_components_has_no_effect(briefly):
    prior = MixturePriors().draw(2, rng=torch.Generator().manual_seed(0))
    y = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(1))
    one = briefly.posteriors(prior, y)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = NormalMixture(prior.logits[:, order], prior.loc[:, order], prior.scale_tril[:, order])
    other = briefly.posteriors(moved, y.flip(1))
    assert torch.allclose(one.mean, other.mean, atol=1e-5)
    assert torch.allclose(one.loc[:, order], other.loc, atol=1e-5)


def test_padding_has_no_effect(briefly):
    prior = MixturePriors().draw(2, rng=torch.Generator().manual_seed(0))
    y = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(1))
    ragged = briefly.posteriors(prior, y, torch.tensor([3, 0]))
    for k, length in ((0, 3), (1, 0)):
        single = NormalMixture(*(p[k : k + 1] for p in (prior.logits, prior.loc, prior.scale_tril)))
        alone = briefly.posteriors(single, y[k : k + 1, :length])
        assert torch.allclose(alone.loc[0], ragged.loc[k], atol=1e-5)


def test_it_is_a_model(briefly, tmp_path):
    net = briefly.with_prior(NormalMixture.univariate([0.4, 0.6], [-1.0, 1.0], [0.5, 0.3]))
    y = torch.randn(6, 1, generator=torch.Generator().manual_seed(2))
    post = pk.infer(net, y, rng=0)
    assert post.sample(5, rng=0)["latent"].shape == (5, 1)
    assert post.predict(None, site="latent").mean.shape == (1,)
    post.save(tmp_path / "post")
    back = pk.load(tmp_path / "post")
    assert torch.equal(back.marginals["latent"].loc, post.marginals["latent"].loc)
    again = back.update(y, rng=0)
    assert torch.equal(again.marginals["latent"].loc, post.update(y, rng=0).marginals["latent"].loc)


def test_it_survives_its_file(briefly, tmp_path):
    path = tmp_path / "dt.safetensors"
    briefly.save(path)
    back = DistributionTransformer.load(path, trained_on=briefly.trained_on)
    prior = MixturePriors().draw(2, rng=torch.Generator().manual_seed(0))
    y = torch.ones(2, 4, 1)
    one, other = (net.posteriors(prior, y).loc for net in (briefly, back))
    assert torch.allclose(one, other, atol=0.02)
    with pytest.raises(DataError, match="trained on the prior"):
        DistributionTransformer.load(path, trained_on="something else")


def test_splitting_components_keeps_the_prior(briefly):
    prior = NormalMixture.univariate([0.3, 0.7], [-1.0, 2.0], [0.5, 0.2])
    filled = briefly.with_prior(prior).prior
    assert len(filled.logits) == 5
    x = torch.linspace(-3, 4, 50)[:, None]
    assert torch.allclose(filled.log_prob(x), prior.log_prob(x), atol=1e-5)


def test_mixtures_equal_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    law = MixturePriors(components=3, coordinates=2).draw(4, rng=generator)
    categorical = torch.distributions.Categorical(logits=law.logits)
    peer = MixtureSameFamily(categorical, MultivariateNormal(law.loc, scale_tril=law.scale_tril))
    x = torch.randn(6, 4, 2, generator=generator)
    assert torch.allclose(law.log_prob(x), peer.log_prob(x), atol=1e-4)
    assert torch.allclose(law.mean, peer.mean, atol=1e-5)
    assert torch.allclose(law.variance, peer.variance, atol=1e-4)
    with pk.scope(rng=0):
        drawn = law.sample((20_000,))
    error = law.variance.sqrt() / math.sqrt(20_000)
    assert ((drawn.mean(0) - law.mean).abs() < 4.5 * error).all()


def test_a_mixture_is_fitted_to_any_prior():
    """An inverse-gamma law of a variance, on the log scale, to within a hundredth of a nat."""
    with pk.scope(rng=0):
        sample = torch.distributions.Gamma(3.0, 2.0).sample((8000,)).log().neg()
    law = NormalMixture.fitted(sample, 5)
    log_p = 3 * math.log(2) - math.lgamma(3) - 3 * GRID - 2 * (-GRID).exp()
    assert divergence(log_p.exp(), law) < 0.01
    assert law.cdf(torch.tensor([0.0])).item() == pytest.approx(
        (sample < 0).float().mean().item(), abs=0.02
    )


def test_bad_input(briefly):
    y = torch.ones(3, 1)
    with pytest.raises(CapabilityError, match="expected a prior; call with_prior"):
        pk.infer(briefly, y, rng=0)
    with pytest.raises(ShapeError, match="at most 5 components in 1 coordinates"):
        briefly.with_prior(NormalMixture.univariate([1.0] * 6, [0.0] * 6, [1.0] * 6))
    net = briefly.with_prior(NormalMixture.univariate([1.0], [0.0], [1.0]))
    with pytest.raises(DataError, match="x must be finite, got nan at row 0"):
        pk.infer(net, torch.tensor([[math.nan]]), rng=0)
    with pytest.raises(ShapeError, match=r"feature=1\], got \(3, 2\)"):
        pk.infer(net, torch.ones(3, 2), rng=0)
    with pytest.raises(CapabilityError, match="predicts its latent only"):
        pk.infer(net, y, rng=0).predict(torch.ones(2))
    with pytest.raises(DataError, match="expected positive weights and scales"):
        NormalMixture.univariate([1.0], [0.0], [-1.0])
    with pytest.raises(DataError, match="expected priors of 1 coordinates"):
        train_distribution_transformer(NormalVariance(), MixturePriors(coordinates=2), rng=0)
    with pytest.raises(ShapeError, match=r"NormalMixture: expected logits"):
        NormalMixture(torch.zeros(2), torch.zeros(3, 1), torch.ones(3, 1, 1))
    with pytest.raises(CapabilityError, match="law on the line"):
        NormalMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None]).cdf(torch.zeros(2))
    with pytest.raises(DataError, match="layers: expected a whole number"):
        TransformerShape(layers=0)


def test_latents_of_several_dimensions():
    """The mean and the log variance of normal observations, under correlated priors."""

    class MeanAndVariance:
        version, coordinates, features = "mean and variance", 2, 1

        def simulate(self, latent, rows, *, rng):
            noise = torch.randn(*latent.shape[:-1], rows, 1, generator=rng)
            return latent[..., None, :1] + (0.5 * latent[..., None, 1:]).exp() * noise

    priors = MixturePriors(components=3, coordinates=2)
    net = train_distribution_transformer(
        MeanAndVariance(), priors, TransformerShape(32, 1, 4), steps=200, batch=32, rng=0
    )
    prior = priors.draw(2, rng=torch.Generator().manual_seed(3))
    with torch.no_grad():
        read, _ = net.network(prior, torch.zeros(2, 0, 1))
    assert (read.mean - prior.mean).abs().max() < 0.5  # the prior as the network reads it
    law = net.posteriors(prior, torch.full((2, 15, 1), 1.0))
    assert law.scale_tril.shape == (2, 3, 2, 2)
    assert law.scale_tril.isfinite().all()
    assert law.log_prob(law.mean).isfinite().all()
