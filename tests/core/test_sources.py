"""Sources of posterior values: frequencies, joint laws, chains."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, constraints

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import MeanField
from probkit.model import Model, Site
from probkit.posterior import Evidence, Posterior, first_chains, join_chains
from probkit.sources import Closed, Draws, Fitted, Population


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


class Two(Model):
    """Two real sites."""

    def sites(self, data):
        return {"a": Site((), constraints.real), "b": Site((2,), constraints.positive, ("d",))}


def fit(a, b=0.0, log_scale=-1.0):
    one = double(1.0)[0]
    return {
        "a": {"loc": a * one, "log_scale": log_scale * one},
        "b": {"loc": b * torch.ones(2).double(), "log_scale": log_scale * torch.ones(2).double()},
    }


def frequencies_agree(counts, probabilities):
    expected = counts.sum() * probabilities / probabilities.sum()
    return scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


# ------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("weighted", [False, True])
def test_draws_are_sampled_by_weight_and_jointly(weighted):
    k = torch.arange(6).reshape(2, 3)
    log_weights = double([0.0, 1.0, -1.0], [0.5, 0.2, 0.9]) if weighted else None
    source = Draws({"k": k, "twice": 2.0 * k.unsqueeze(-1)}, log_weights)
    values = source.sample(6000, rng=0)
    assert values["k"].shape == (6000,)
    assert values["twice"].shape == (6000, 1)
    assert torch.equal(values["twice"][:, 0], 2.0 * values["k"])
    weights = torch.ones(6).double() if log_weights is None else log_weights.flatten().exp()
    assert frequencies_agree(torch.bincount(values["k"], minlength=6), weights)


def test_a_draw_without_weight_is_never_taken():
    source = Draws({"k": torch.arange(2)[None]}, double([0.0, -torch.inf]))
    assert source.sample(500, rng=0)["k"].max() == 0


def test_sampling_repeats_itself_and_generators_advance():
    source = Draws({"k": torch.arange(1000)[None]})
    assert torch.equal(source.sample(9, rng=4)["k"], source.sample(9, rng=4)["k"])
    generator = torch.Generator().manual_seed(0)
    first = source.sample(9, rng=generator)["k"]
    assert not torch.equal(first, source.sample(9, rng=generator)["k"])


def test_draws_join_and_lose_chains():
    one = Draws({"a": double([1.0, 2.0])}, double([0.1, 0.2]))
    both = one.join([Draws({"a": double([3.0, 4.0])}, double([0.3, 0.4]))])
    assert both.chains == 2
    assert both.values["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert both.log_weights.tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert both.first_chains(1).values["a"].tolist() == [[1.0, 2.0]]


def test_draws_need_one_leading_shape():
    with pytest.raises(ShapeError, match=r"expected equal leading \[chain, draw\] dims"):
        Draws({"a": torch.zeros(1, 3), "b": torch.zeros(1, 4)})
    with pytest.raises(ShapeError, match=r"expected equal leading \[chain, draw\] dims"):
        Draws({"a": torch.zeros(3)})
    with pytest.raises(ShapeError, match=r"expected equal leading \[chain, draw\] dims"):
        Draws({"a": torch.zeros(1, 3)}, torch.zeros(1, 2))


# ------------------------------------------------------------------------------ closed


def test_a_closed_form_samples_its_law():
    source = Closed({"a": Normal(double(2.0, 5.0), 0.5), "b": Normal(double(0.0)[0], 1.0)})
    values = source.sample(3000, rng=0)
    assert values["a"].shape == (3000, 2)
    assert values["b"].shape == (3000,)
    pvalue = scipy.stats.kstest(values["a"][:, 1].numpy(), scipy.stats.norm(5, 0.5).cdf).pvalue
    assert pvalue > 1e-3
    correlation = torch.corrcoef(torch.stack([values["a"][:, 0], values["b"]]))[0, 1]
    assert abs(correlation) < 4 / 3000**0.5


@pytest.mark.parametrize("weighted", [False, True])
def test_sites_go_with_their_hyper_draw(weighted):
    h = double([0.0, 10.0, 20.0], [30.0, 40.0, 50.0])
    log_weights = double([0.0, 1.0, 0.0], [0.0, -1.0, 0.5]) if weighted else None
    source = Closed({"a": Normal(h, 0.01)}, {"h": h}, log_weights=log_weights)
    assert source.is_mixture
    assert source.chains == 2
    values = source.sample(6000, rng=0)
    assert (values["a"] - values["h"]).abs().max() < 0.1
    weights = torch.ones(6).double() if log_weights is None else log_weights.flatten().exp()
    counts = torch.bincount((values["h"] / 10).long(), minlength=6)
    assert frequencies_agree(counts, weights)


def test_one_hyper_draw_leaves_the_joint_as_it_is():
    source = Closed({"a": Normal(double(1.0, 2.0), 1.0)}, {"h": double([[7.0]])[0]})
    values = source.sample(5, rng=0)
    assert not source.is_mixture
    assert values["a"].shape == (5, 2)
    assert values["h"].tolist() == [7.0] * 5
    assert source.arrays()["h"].shape == (1, 1)


def test_closed_forms_keep_their_chains():
    source = Closed({}, repeats=3)
    assert source.chains == 3
    assert source.first_chains(3) is source
    assert source.join([]) is source
    with pytest.raises(CapabilityError, match="no chains to drop"):
        source.first_chains(1)
    with pytest.raises(CapabilityError, match="cannot be joined"):
        source.join([source])


# ------------------------------------------------------------------------------ fitted


def test_fits_are_mixed_in_equal_shares():
    source = Fitted(MeanField(), [fit(0.0, 0.0), fit(50.0, 2.0), fit(100.0, 4.0)])
    values = source.sample(3000, model=Two(), data=None, rng=0)
    owner = (values["a"] / 50).round().long()
    assert frequencies_agree(torch.bincount(owner, minlength=3), torch.ones(3).double())
    # Both sites of a draw come from one fit.
    logs = values["b"].log()
    expected = 2.0 * owner.double()
    assert (logs - expected[:, None]).abs().max() < 4.5 * torch.tensor(1.0).exp().item() ** -1
    # The order says nothing about the fit.
    assert abs(torch.corrcoef(torch.stack([owner[1:], owner[:-1]]).double())[0, 1]) < 4 / 3000**0.5


def test_one_fit_has_the_guides_law():
    source = Fitted(MeanField(), [fit(1.0)])
    a = source.sample(3000, model=Two(), data=None, rng=1)["a"]
    law = scipy.stats.norm(1.0, torch.tensor(-1.0).exp().item())
    assert scipy.stats.kstest(a.numpy(), law.cdf).pvalue > 1e-3
    marginal = source.marginals(Two(), None)["a"]
    assert marginal.mean == 1.0
    assert Fitted(MeanField(), [fit(0.0), fit(1.0)]).marginals(Two(), None) == {}


def test_fits_join_and_lose_chains():
    both = Fitted(MeanField(), [fit(0.0)]).join([Fitted(MeanField(), [fit(1.0)])])
    assert both.chains == 2
    assert both.arrays() == {}
    assert both.first_chains(1).params[0]["a"]["loc"] == 0


# ------------------------------------------------------------------------------ populations


def test_particles_of_any_kind_are_sampled_by_weight():
    log_weights = double([0.0, 1.0], [2.0, -torch.inf])
    objects = Population([["a", "b"], ["c", "d"]], log_weights)
    found = objects.sample(3000, rng=0)["particle"]
    counts = torch.tensor([found.count(letter) for letter in "abc"])
    assert found.count("d") == 0
    assert frequencies_agree(counts, double(0.0, 1.0, 2.0).exp())
    assert objects.best() == "c"
    assert objects.arrays() == {}
    tensors = Population([torch.tensor([0, 1]), torch.tensor([2, 3])], log_weights)
    drawn = tensors.sample(3000, rng=0)["particle"]
    assert drawn.shape == (3000,)
    assert torch.equal(tensors.arrays()["particle"], torch.tensor([[0, 1], [2, 3]]))
    assert ["abcd"[k] for k in drawn.tolist()] == found


def test_populations_join_and_lose_chains():
    one = Population([["a", "b"]], double([0.0, 1.0]))
    both = one.join([Population([["c", "d"]], double([2.0, 3.0]))])
    assert both.chains == 2
    assert both.first_chains(1).particles == [["a", "b"]]
    with pytest.raises(DataError, match=r"need one size, got \[1, 2\]"):
        one.join([Population([["c"]], double([2.0]))])
    with pytest.raises(ShapeError, match=r"expected log_weights \[chain=1, particle=\[2\]\]"):
        Population([["a", "b"]], torch.zeros(1, 3))


# ------------------------------------------------------------------------------ posteriors


def block(shift):
    return Posterior(
        Draws({"a": shift + torch.arange(6.0).reshape(2, 3)}),
        Two(),
        log_evidence=Evidence(shift + double(1.0, 2.0), "estimate"),
        sample_stats={"lp": torch.full((2, 3), shift)},
        attrs={"n": 1},
    )


def test_blocks_join_and_padding_is_dropped():
    joined = join_chains([block(0.0), block(100.0)])
    assert joined.chains == 4
    assert joined.draws["a"][:, 0].tolist() == [0.0, 3.0, 100.0, 103.0]
    assert joined.log_evidence.value.tolist() == [1.0, 2.0, 101.0, 102.0]
    assert joined.sample_stats["lp"][:, 0].tolist() == [0.0, 0.0, 100.0, 100.0]
    kept = first_chains(joined, 3)
    assert kept.chains == 3
    assert kept.log_evidence.value.tolist() == [1.0, 2.0, 101.0]
    assert kept.sample_stats["lp"].shape == (3, 3)


def test_sample_needs_a_positive_number():
    with pytest.raises(DataError, match="sample: expected a whole number of draws n >= 1, got 0"):
        block(0.0).sample(0, rng=0)
    with pytest.raises(DataError, match="rng must be an integer"):
        block(0.0).sample(1, rng=None)


def test_evidence_states_its_shape_and_kind():
    with pytest.raises(ShapeError, match=r"expected value \[chain\], got \(\)"):
        Evidence(torch.tensor(1.0), "exact")
    with pytest.raises(DataError, match="expected kind exact, bound or estimate, got 'guess'"):
        Evidence(torch.zeros(1), "guess")


def test_updates_need_the_capability():
    with pytest.raises(CapabilityError, match="Two lacks update; run infer on old and new data"):
        block(0.0).update(None, rng=0)
