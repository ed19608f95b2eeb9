"""Particle Gibbs: exact marginals for two and three particles, and mutants."""

from __future__ import annotations

import pytest
import torch

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import ParticleGibbs, conditional_sweep, gibbs
from probkit.model import Model


def invariance(exact, model, y, n, repeats, **options):
    """Start from exact posterior draws and take one sweep: the law must stay what it is.

    Returns z-scores of all single and pairwise state frequencies.
    """
    truth = exact.hmm(model, y)
    g = torch.Generator().manual_seed(0)
    start = truth.paths[torch.multinomial(truth.weights, repeats, True, generator=g)]
    found = []
    for path in start:
        reference = torch.cat([torch.zeros(1, dtype=torch.int64), path])
        found.append(conditional_sweep(model, y, n, reference, rng=g, **options).path[1:])
    paths = torch.stack(found)
    one_hot = torch.nn.functional.one_hot(paths, 3).double()
    pairs = torch.einsum("ptk,ptl->ptkl", one_hot[:, :-1], one_hot[:, 1:])
    parts = [(one_hot, truth.marginals), (pairs, truth.pairs)]
    scores = []
    for sample, expected in parts:
        error = (sample.mean(0) - expected).abs()
        scores.append((error / (expected * (1 - expected) / repeats).sqrt()).flatten())
    return torch.cat(scores), paths, start


def check_invariant(*arguments, **options):
    scores, paths, start = invariance(*arguments, **options)
    assert float(scores.max()) < 4.2  # 72 scores: passes with probability 0.998
    assert float((paths != start).double().mean()) > 0.02


@pytest.mark.parametrize("ancestor_sampling", [True, False])
@pytest.mark.parametrize("n", [2, 3])
def test_one_sweep_leaves_the_posterior_invariant(exact, hmm, n, ancestor_sampling):
    check_invariant(exact, *hmm, n, 400, ancestor_sampling=ancestor_sampling)


def _mutate(monkeypatch, name):
    original = gibbs._ancestors

    def no_ancestor_draw(model, t, cloud, reference, sampling, data, rng):
        # The reference's slot descends from a random particle, whatever the density says.
        ancestors = original(model, t, cloud, reference, False, data, rng)
        if t == 0:
            return ancestors
        drawn = gibbs.multinomial(cloud.weights, 1, rng)
        return torch.cat([ancestors[:-1], drawn])

    def off_by_one(model, t, cloud, reference, sampling, data, rng):
        late = reference[torch.arange(len(reference)).sub(1).clamp_min(0)]
        return original(model, t, cloud, late, sampling, data, rng)

    def unbound(particles, reference, position):
        return particles

    replacements = {
        "no_ancestor_draw": ("_ancestors", no_ancestor_draw),
        "off_by_one": ("_ancestors", off_by_one),
        "unbound": ("_bind", unbound),
    }
    monkeypatch.setattr(gibbs, *replacements[name])


@pytest.mark.parametrize("mutant", ["no_ancestor_draw", "off_by_one", "unbound"])
def test_the_check_catches_mutants(exact, hmm, monkeypatch, mutant):
    _mutate(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        check_invariant(exact, *hmm, 2, 400)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_long_chains_reach_the_exact_marginals(exact, hmm, n):
    model, y = hmm
    truth = exact.hmm(model, y)
    post = infer(model, y, ParticleGibbs(n, draws=300, warmup=20), rng=0, chains=8)
    one_hot = torch.nn.functional.one_hot(post.draws["path"], 3).double().mean(1)
    error = (one_hot.mean(0) - truth.marginals).abs()
    assert bool((error < 4 * one_hot.std(0) / 8**0.5 + 1e-3).all())


def test_draws_and_statistics(lgssm, exact):
    y = lgssm.simulate_path(20, rng=0)[1][0]
    truth = exact.gaussian(lgssm, y)
    post = infer(lgssm, y, ParticleGibbs(15, draws=60, warmup=10), rng=0, chains=2)
    path = post.draws["path"]
    assert path.shape == (2, 60, 20, 1)
    sd = truth.covariance[range(20), 0, range(20), 0].sqrt()
    error = (path.mean((0, 1))[:, 0] - truth.mean[:, 0]).abs()
    assert bool((error < 4.5 * sd / 30**0.5).all())  # at least 30 effective draws of 120
    assert post.sample_stats["renewed"].shape == (2, 60, 20)
    assert float(post.sample_stats["renewed"].double().mean()) > 0.6
    assert post.to_datatree()["sample_stats"]["ess"].shape == (2, 60, 20)


def test_ancestor_sampling_renews_the_early_steps(lgssm):
    y = lgssm.simulate_path(40, rng=0)[1][0]
    first = {}
    for sampling in (True, False):
        options = ParticleGibbs(5, draws=20, warmup=0, ancestor_sampling=sampling)
        post = infer(lgssm, y, options, rng=0)
        first[sampling] = float(post.sample_stats["renewed"][0, :, :15].double().mean())
    assert first[False] < 0.05 < 0.5 < first[True]


def test_guided_sweeps(lgssm):
    y = lgssm.simulate_path(10, rng=0)[1][0]
    post = infer(lgssm, y, ParticleGibbs(5, draws=5, warmup=0, guided=True), rng=0)
    assert post.draws["path"].shape == (1, 5, 10, 1)


class Words(Model):
    """Particles are words over {a, b}; words of two equal letters in a row are unlikely."""

    def sites(self, data):
        return {}

    def steps(self, data):
        return 3

    def start(self, n, data, *, rng):
        return [""] * n

    def extend(self, t, particles, data, *, rng):
        letters = torch.randint(2, (len(particles),), generator=rng).tolist()
        return [word + "ab"[k] for word, k in zip(particles, letters, strict=True)]

    def log_weight(self, t, old, new, data):
        same = [len(word) > 1 and word[-1] == word[-2] for word in new]
        return torch.where(torch.tensor(same), torch.tensor(0.1), torch.tensor(1.0)).log()


def test_words_as_particles():
    options = ParticleGibbs(4, draws=200, warmup=5, ancestor_sampling=False)
    post = infer(Words(), None, options, rng=0, chains=4)
    words = post.particles.particles
    assert [len(chain) for chain in words] == [200] * 4
    share = torch.tensor([[w in ("aba", "bab") for w in chain] for chain in words]).double().mean(1)
    # Exact: 1 / (1 + 0.1)^2 of the mass has no repetition.
    assert abs(float(share.mean()) - 1 / 1.21) < 4 * float(share.std()) / 2 + 0.01


def test_no_transition_density():
    with pytest.raises(CapabilityError, match="Words lacks it. Use ancestor_sampling=False"):
        infer(Words(), None, ParticleGibbs(4), rng=0)


def test_one_particle_is_no_sampler():
    with pytest.raises(DataError, match="whole n >= 2, got 1"):
        ParticleGibbs(1)


def test_resumes_bit_for_bit(hmm, tmp_path):
    model, y = hmm
    options = ParticleGibbs(3, draws=12, warmup=2)
    whole = infer(model, y, options, rng=1)
    stop = [lambda info: info.step == 7]
    part = infer(model, y, options, rng=1, checkpoint=tmp_path, callbacks=stop)
    assert part.draws["path"].shape[1] == 4
    resumed = infer(model, y, options, rng=1, checkpoint=tmp_path)
    assert torch.equal(whole.draws["path"], resumed.draws["path"])
