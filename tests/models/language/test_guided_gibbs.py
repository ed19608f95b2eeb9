"""Particle Gibbs and parallel tempering on answers: the exact posterior stays what it is."""

from __future__ import annotations

import pytest
import torch
from support.guided_toys import (
    PROMPT,
    Flaky,
    Local,
    Prefixed,
    Value,
    chain,
    enumerate_target,
    key_of,
    model_of,
)

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference import ParallelTempering, ParticleGibbs
from probkit.inference.smc import conditional_sweep
from probkit.inference.smc.parallel import log_potential_of, swap, tempered
from probkit.models.language import Capabilities, Law, MarkovLM
from probkit.models.language.grafting import Grafting

OTHER = MarkovLM([0.3, 0.3, 0.4], [[0.3, 0.3, 0.4]] * 3, end=0.3)


def start_exactly(truth, repeats, generator):
    index = torch.multinomial(truth.weights, repeats, True, generator=generator)
    return [truth.paths[i] for i in index.tolist()]


def largest_z(truth, answers):
    """Largest |z| of answer frequencies among answers of probability at least 0.02."""
    counts: dict[tuple[str, bool], int] = {}
    for answer in answers:
        counts[key_of(answer)] = counts.get(key_of(answer), 0) + 1
    n, worst = len(answers), 0.0
    for key, p in truth.law.items():
        if p >= 0.02:
            z = (counts.get(key, 0) / n - p) / (p * (1 - p) / n) ** 0.5
            worst = max(worst, abs(z))
    assert set(counts) <= set(truth.law)
    return worst


def check_invariant(model, n, *, repeats=350, least_moved=0.1, **options):
    """Start from exact draws, take one sweep: the law of answers must stay."""
    truth = enumerate_target(model)
    g = torch.Generator().manual_seed(0)
    start = start_exactly(truth, repeats, g)
    after = [conditional_sweep(model, PROMPT, n, path, rng=g, **options).path for path in start]
    assert largest_z(truth, [path[-1] for path in after]) < 3.7  # about 12 answers
    for path in after[:20]:
        check_path(model, path)
    moved = [key_of(a[-1]) != key_of(b[-1]) for a, b in zip(start, after, strict=True)]
    assert sum(moved) > least_moved * repeats


def check_path(model, path):
    """Every entry continues the one before, and its increments are the target's own."""
    for t, (old, new) in enumerate(zip(path, path[1:], strict=False)):
        assert new.prefix.text.startswith(old.prefix.text)
        if old.finished:
            assert new.prefix == old.prefix and new.log_increment == 0.0
        else:
            gain = model.log_potential(t, [old], [new], PROMPT)
            assert float(gain) == pytest.approx(new.log_potential - old.log_potential)
    assert len(path) == model.steps.max_steps + 1


@pytest.mark.parametrize("ancestor_sampling", [True, False])
@pytest.mark.parametrize("n", [2, 3])
def test_a_sweep_leaves_the_posterior_invariant(n, ancestor_sampling):
    check_invariant(model_of(Prefixed()), n, ancestor_sampling=ancestor_sampling)


@pytest.mark.parametrize(
    ("potential", "options"),
    [
        (Local(), {}),
        (Value(), {}),
        (Prefixed(), {"proposal": OTHER}),
        (Prefixed(), {"proposal": Law(temperature=2.0), "law": Law(temperature=0.7)}),
        (Value(), {"power": 0.5}),
    ],
    ids=["local", "value", "other model", "laws", "power"],
)
def test_other_targets_stay_too(potential, options):
    check_invariant(model_of(potential, **options), 3)


def _blind(monkeypatch):
    """Mutant: ancestors are drawn without the potentials of the reference's rest."""
    monkeypatch.setattr(Grafting, "_gains", lambda self, candidates, log_p: [0.0] * len(log_p))


def _stale(monkeypatch):
    """Mutant: the rest keeps the potentials it had after its own prefix."""
    right = Grafting.onto

    def onto(self, particle):
        path = right(self, particle)
        pairs = zip(path, self.path, strict=True)
        return [new._replace(log_increment=old.log_increment) for new, old in pairs]

    monkeypatch.setattr(Grafting, "onto", onto)


def _unscored(monkeypatch):
    """Mutant: ancestors are drawn without the likelihood of the reference's rest."""
    right = Grafting._scores

    def scores(self, candidates):
        found = right(self, candidates)
        return [0.0 if value > -float("inf") else value for value in found]

    monkeypatch.setattr(Grafting, "_scores", scores)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [_blind, _stale, _unscored])
def test_the_check_catches_mutants(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_invariant(model_of(Prefixed()), 2, repeats=700)


def test_local_potentials_are_taken_over():
    local, asked = model_of(Local()), model_of(Asked())
    truth = enumerate_target(local)
    g = torch.Generator().manual_seed(0)
    for path in start_exactly(truth, 10, g):
        others = [p[1] for p in start_exactly(truth, 6, g)]
        mine = Grafting(local, path, 1).log_future(others)
        theirs = Grafting(asked, path, 1).log_future(others)
        assert torch.allclose(mine, theirs, atol=1e-12)


class Asked(Local):
    """The same potential without the promise."""

    local = False


@pytest.mark.slow
def test_long_chains_reach_the_exact_answers():
    model = model_of(Prefixed())
    truth = enumerate_target(model)
    post = infer(model, PROMPT, ParticleGibbs(3, draws=60, warmup=5), rng=0, chains=8)
    assert post.log_weights.shape == (8, 60)
    likely = [key for key, p in truth.law.items() if p > 0.05]
    for key in likely:
        shares = [sum(key_of(p) == key for p in chain) / 60 for chain in post.particles.particles]
        each = torch.tensor(shares, dtype=torch.float64)
        error = float(each.std() / 8**0.5)
        assert abs(float(each.mean()) - truth.law[key]) < 4 * error + 0.01
    assert post.sample_stats["renewed"].shape == (8, 60, 3)


# ---------------------------------------------------------------- parallel tempering


def check_ladder(model, powers, n, repeats, exchange=swap):
    """Start every rung from its own exact law; a round must leave the coldest rung's law."""
    g = torch.Generator().manual_seed(0)
    laws = [enumerate_target(tempered(model, power)) for power in powers]
    starts = [start_exactly(law, repeats, g) for law in laws]
    cold, hot, accepted = [], [], 0
    for paths in zip(*starts, strict=True):
        after = [
            conditional_sweep(tempered(model, power), PROMPT, n, path, rng=g).path
            for power, path in zip(powers, paths, strict=True)
        ]
        sums = [log_potential_of(model, path, PROMPT) for path in after]
        after, sums, swapped = exchange(after, sums, powers, rng=g)
        assert sums == pytest.approx([path[-1].log_potential for path in after])
        accepted += sum(swapped)
        cold.append(after[0][-1])
        hot.append(after[-1][-1])
    assert largest_z(laws[0], cold) < 3.7
    assert largest_z(laws[-1], hot) < 3.7
    assert 0.1 * repeats < accepted < (len(powers) - 1) * repeats


def test_swaps_leave_the_posterior_invariant():
    check_ladder(model_of(Prefixed()), (1.0, 0.3), 2, 250)


@pytest.mark.slow
@pytest.mark.parametrize("potential", [Prefixed(), Value()])
def test_longer_ladders_and_proposals(potential):
    check_ladder(model_of(potential, proposal=OTHER), (1.0, 0.5, 0.2), 2, 400)


def test_the_check_catches_wrong_swaps():
    def always(paths, sums, powers, *, rng):
        return paths[::-1], sums[::-1], [True] * (len(paths) - 1)

    with pytest.raises(AssertionError):
        check_ladder(model_of(Prefixed()), (1.0, 0.3), 2, 250, exchange=always)


def test_ladders_through_infer():
    ladder = ParallelTempering(ParticleGibbs(2, draws=15, warmup=2), (1.0, 2.0, 6.0))
    post = infer(model_of(Prefixed()), PROMPT, ladder, rng=0, chains=2)
    assert post.sample_stats["swapped"].shape == (2, 15, 2)
    assert post.sample_stats["log_potential"].shape == (2, 15, 3)
    found = [[p.log_potential for p in row] for row in post.particles.particles]
    cold = post.sample_stats["log_potential"][:, :, 0]
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), cold)
    again = infer(model_of(Prefixed()), PROMPT, ladder, rng=0)
    assert [p.text for p in again.particles.particles[0]] == [
        p.text for p in post.particles.particles[0]
    ]


@pytest.mark.parametrize("ladder", [(1.0,), (2.0, 4.0), (1.0, 3.0, 2.0), (1.0, float("inf"))])
def test_bad_ladders(ladder):
    with pytest.raises(DataError, match="at least two finite temperatures that rise from exactly"):
        ParallelTempering(ParticleGibbs(2), ladder)
    with pytest.raises(DataError, match=r"expected ParticleGibbs\(...\) to temper"):
        ParallelTempering(3)


# ---------------------------------------------------------------- bad input


class Silent(Flaky):
    """A back end that cannot score given text."""

    capabilities = Capabilities(logprobs=True)


def test_ancestor_sampling_needs_scores():
    model = model_of(Local(), lm=Silent(chain(), share=0.0))
    with pytest.raises(CapabilityError, match="with prompt_logprobs; Silent has none. Use"):
        infer(model, PROMPT, ParticleGibbs(2, draws=2), rng=0)
    infer(model, PROMPT, ParticleGibbs(2, draws=2, warmup=0, ancestor_sampling=False), rng=0)
    with pytest.raises(CapabilityError, match="with logits; Silent has none"):
        infer(
            model_of(Local(), lm=model.lm, law=Law(temperature=0.5)),
            PROMPT,
            ParticleGibbs(2, draws=2),
            rng=0,
        )


def test_one_particle_is_too_few():
    with pytest.raises(DataError, match="ParticleGibbs: expected a whole n >= 2, got 1"):
        ParticleGibbs(1)
