"""Particle filters: unbiased evidence, exact limits, guided moves, objects, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import ParticleFilter, Proposal, log_evidence_estimate
from probkit.inference.smc.resampling import RESAMPLERS, systematic
from probkit.model import Batch, Model
from probkit.models.state_space import DiscreteHMM, LinearGaussian


def evidence_ratios(model, y, log_evidence, repeats=300, n=12, seed=0, **options):
    """Independent estimates of the evidence over its exact value."""
    g = torch.Generator().manual_seed(seed)
    runs = [log_evidence_estimate(model, y, n, rng=g, **options) for _ in range(repeats)]
    return (torch.stack(runs) - log_evidence).exp()


def check_unbiased(exact, model, y, log_evidence, **options):
    assert abs(exact.z(evidence_ratios(model, y, log_evidence, **options), 1.0)) < 4


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_evidence_is_unbiased_on_the_discrete_chain(exact, hmm, name, threshold):
    model, y = hmm
    truth = exact.hmm(model, y).log_evidence
    check_unbiased(exact, model, y, truth, resampler=name, ess_threshold=threshold)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_evidence_is_unbiased_on_the_linear_gaussian_model(exact, name):
    model = LinearGaussian(0.9, 0.3, 1.0, 0.5)
    y = model.simulate_path(8, rng=4)[1][0]
    truth = exact.gaussian(model, y).log_evidence
    check_unbiased(exact, model, y, truth, resampler=name, n=24, repeats=200)


class OldState(DiscreteHMM):
    """A mutant: it weighs the state before the step."""

    def log_weight(self, t, old, new, data):
        return self.log_observation(data[t], old if t > 0 else new)


class LateObservation(DiscreteHMM):
    """A mutant: it looks at the next observation."""

    def log_weight(self, t, old, new, data):
        return self.log_observation(data[min(t + 1, len(data) - 1)], new)


def sharpened(weights, n, rng):
    """A mutant resampler."""
    return systematic(weights**1.5, n, rng)


def test_the_evidence_check_catches_mutants(exact, hmm):
    model, y = hmm
    truth = exact.hmm(model, y).log_evidence
    parts = (model.initial, model.transition, model.emission)
    with pytest.raises(AssertionError):
        check_unbiased(exact, model, y, truth, resampler=sharpened, ess_threshold=1.0)
    for mutant in (OldState, LateObservation):
        with pytest.raises(AssertionError):
            check_unbiased(exact, mutant(*parts), y, truth)


def test_no_resampling_is_importance_sampling(hmm):
    model, y = hmm
    post = infer(model, y, ParticleFilter(50, ess_threshold=0.0, paths=True), rng=3)
    log_weights = torch.zeros(50, dtype=torch.float64)
    for t in range(len(y)):
        log_weights += model.log_observation(y[t], post.draws["path"][0, :, t])
    assert torch.allclose(post.log_weights[0], log_weights.log_softmax(0))
    assert float(post.log_evidence.value) == pytest.approx(
        float(log_weights.logsumexp(0)) - math.log(50)
    )
    assert not bool(post.sample_stats["resampled"].any())
    assert post.sample_stats["unique_ancestors"].tolist() == [[50] * 6]


def test_paths_approach_the_exact_marginals(exact, hmm):
    model, y = hmm
    truth = exact.hmm(model, y)
    post = infer(model, y, ParticleFilter(2000, paths=True), rng=0, chains=20)
    assert post.draws["path"].shape == (20, 2000, 6)
    weights = post.log_weights.exp()
    one_hot = torch.nn.functional.one_hot(post.draws["path"], 3).double()
    found = torch.einsum("cp,cptk->ctk", weights, one_hot)
    error = found.mean(0) - truth.marginals
    assert bool((error.abs() < 4.5 * found.std(0) / 20**0.5 + 1e-4).all())


def test_traced_paths_are_consistent(lgssm):
    y = lgssm.simulate_path(15, rng=1)[1][0]
    post = infer(lgssm, y, ParticleFilter(40, paths=True, ess_threshold=1.0), rng=0)
    path = post.draws["path"][0, :, :, 0]
    distinct = [len(column.unique()) for column in path.mT]
    assert distinct == post.sample_stats["unique_ancestors"][0].tolist()
    assert distinct[0] <= 20 and distinct[-1] == 40


def test_pruning_changes_nothing(lgssm, monkeypatch):
    from probkit.inference.smc import genealogy

    y = lgssm.simulate_path(30, rng=1)[1][0]
    options = ParticleFilter(20, paths=True, ess_threshold=0.9)
    whole = infer(lgssm, y, options, rng=0)
    monkeypatch.setattr(genealogy, "_SMALLEST", 100)
    cut = infer(lgssm, y, options, rng=0)
    assert torch.equal(whole.draws["path"], cut.draws["path"])
    for name, value in whole.sample_stats.items():
        assert torch.equal(value, cut.sample_stats[name])


def test_guided_filter_is_unbiased_and_better(exact):
    model = LinearGaussian(
        [[0.9, 0.2], [0.0, 0.7]], [[0.5, 0.1], [0.1, 0.3]], [[1.0, 0.0]], [[0.05]], None, None
    )
    y = model.simulate_path(6, rng=2)[1][0]
    y[3] = math.nan
    truth = exact.gaussian(model, y).log_evidence
    runs = {
        guided: infer(
            model, y, ParticleFilter(60, guided=guided), rng=0, chains=60
        ).log_evidence.value
        for guided in (False, True)
    }
    for values in runs.values():
        assert abs(exact.z((values - truth).exp(), 1.0)) < 4
    assert runs[True].std() < 0.5 * runs[False].std()


class OwnProposal(Proposal):
    """A proposal given as guide: the model's own, by another name."""

    def __init__(self, model):
        self.model = model

    def propose(self, t, particles, data, *, rng):
        return self.model.propose(t, particles, data, rng=rng)

    def log_proposal(self, t, old, new, data):
        return self.model.log_proposal(t, old, new, data)


def test_a_guide_proposes(lgssm):
    y = lgssm.simulate_path(5, rng=0)[1][0]
    own = infer(lgssm, y, ParticleFilter(50, guided=True), rng=0)
    given = infer(lgssm, y, ParticleFilter(50), guide=OwnProposal(lgssm), rng=0)
    assert torch.equal(own.log_weights, given.log_weights)
    values, log_q = OwnProposal(lgssm).sample({}, lgssm, Batch(y), 4, rng=0)
    assert values["path"].shape == (4, 5, 1) and log_q.total().shape == (4,)


def test_guided_needs_a_proposal(hmm):
    model, y = hmm
    with pytest.raises(CapabilityError, match="DiscreteHMM lacks propose, log_proposal"):
        infer(model, y, ParticleFilter(5, guided=True), rng=0)


# --------------------------------------------------------------------------- objects as particles


class EarlyStopper(Model):
    """A first token "S" stops with score 0.8, "C" goes on through four steps of score 0.7.

    Particles are strings. The scores are factors of each step, or values of the whole prefix.
    """

    def __init__(self, potential):
        self.potential = potential

    def sites(self, data):
        return {}

    def steps(self, data):
        return 4

    def start(self, n, data, *, rng):
        return [""] * n

    def extend(self, t, particles, data, *, rng):
        if t == 0:
            return ["S" if u < 0.5 else "C" for u in torch.rand(len(particles), generator=rng)]
        return [text if text[0] == "S" else text + "C" for text in particles]

    def log_weight(self, t, old, new, data):
        def factor(before, after):
            if before == after:
                return 1.0
            value = 0.8 if after == "S" else 0.7
            if self.potential == "per_step":
                return value
            return value / (1.0 if before == "" else 0.7)

        return torch.tensor([math.log(factor(a, b)) for a, b in zip(old, new, strict=True)])


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("potential", "truth"), [("per_step", 0.769), ("value", 0.533)])
def test_the_early_stopper(exact, potential, truth, threshold):
    options = ParticleFilter(64, ess_threshold=threshold, resampler="multinomial")
    post = infer(EarlyStopper(potential), None, options, rng=0, chains=60)
    stopped = torch.tensor(
        [[text == "S" for text in chain] for chain in post.particles.particles]
    ).double()
    # Evidence-weighted groups give an unbiased numerator and denominator.
    evidence = post.log_evidence.value.exp()
    share = (post.log_weights.exp() * stopped).sum(1)
    ratio = (evidence * share).mean() / evidence.mean()
    influence = evidence * (share - ratio) / evidence.mean()
    error = float(influence.std() / 60**0.5)
    assert abs(float(ratio) - truth) < 4 * error + 5e-4
    z = {"per_step": 0.5 * 0.8 + 0.5 * 0.7**4, "value": 0.75}[potential]
    assert abs(exact.z(evidence, z)) < 4
    assert error < 0.02


def test_object_populations_answer_questions():
    post = infer(EarlyStopper("per_step"), None, ParticleFilter(8), rng=0)
    assert post.particles.best() in ("S", "CCCC")
    assert set(post.sample(20, rng=1)["particle"]) <= {"S", "CCCC"}


# --------------------------------------------------------------------------- driver and errors


def test_chains_are_independent_of_their_number(lgssm):
    y = lgssm.simulate_path(10, rng=0)[1][0]
    one = infer(lgssm, y, ParticleFilter(30), rng=5)
    three = infer(lgssm, y, ParticleFilter(30), rng=5, chains=3)
    assert torch.equal(one.log_weights[0], three.log_weights[0])
    assert len(three.log_evidence.value.unique()) == 3


def test_interrupted_filter_resumes_bit_for_bit(lgssm, tmp_path):
    y = lgssm.simulate_path(12, rng=0)[1][0]
    options = ParticleFilter(30, paths=True)
    whole = infer(lgssm, y, options, rng=1, chains=2)
    part = infer(
        lgssm, y, options, rng=1, chains=2, checkpoint=tmp_path, callbacks=[lambda i: i.step == 5]
    )
    assert part.draws["path"].shape[2] == 5 and not part.attrs["complete"]
    resumed = infer(lgssm, y, options, rng=1, chains=2, checkpoint=tmp_path)
    assert torch.equal(whole.draws["path"], resumed.draws["path"])
    assert torch.equal(whole.log_evidence.value, resumed.log_evidence.value)


def test_arviz_sees_the_traces(lgssm):
    y = lgssm.simulate_path(7, rng=0)[1][0]
    tree = infer(lgssm, y, ParticleFilter(30), rng=1, chains=2).to_datatree(draws=20, rng=0)
    assert tree["sample_stats"]["ess"].shape == (2, 7)
    assert tree["posterior"]["particle"].shape == (2, 20, 1)


@pytest.mark.parametrize("n", [7, 20])
def test_traces_are_no_draws_when_their_lengths_agree(lgssm, n):
    """As many steps as particles, or as exported draws: the trace stays as it was."""
    y = lgssm.simulate_path(7, rng=0)[1][0]
    post = infer(lgssm, y, ParticleFilter(n), rng=1, chains=2)
    stats = post.to_datatree(draws=7, rng=0)["sample_stats"]
    assert stats["ess"].dims == ("chain", "step") == stats["unique_ancestors"].dims
    assert np.array_equal(stats["ess"], post.sample_stats["ess"])


def test_death_names_the_step():
    model = DiscreteHMM([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(DataError, match="every particle has weight zero after step 2"):
        infer(model, [0, 0, 1], ParticleFilter(10), rng=0)
    estimate = log_evidence_estimate(
        model, torch.tensor([0, 1]), 10, rng=torch.Generator().manual_seed(0)
    )
    assert float(estimate) == -math.inf


def test_no_steps(lgssm):
    with pytest.raises(DataError, match="expected data of at least one step, got 0"):
        infer(lgssm, torch.zeros(0, 1).double(), ParticleFilter(10), rng=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "whole n >= 1, got 0"),
        ({"ess_threshold": 1.5}, "0 <= ess_threshold <= 1, got 1.5"),
        ({"resampler": "best"}, "expected one of multinomial"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        ParticleFilter(**options)
