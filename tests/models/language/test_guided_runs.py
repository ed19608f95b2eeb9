"""Runs of guided generation: budgets, failures, extinction, resuming, export."""

from __future__ import annotations

import math

import pytest
import torch
from support.guided_toys import (
    PROMPT,
    Flaky,
    Local,
    Prefixed,
    chain,
    enumerate_target,
    evidence_z,
    model_of,
    posterior_z,
)

import probkit as pk
from probkit import infer
from probkit.errors import DataError
from probkit.inference import ParticleFilter, ParticleGibbs
from probkit.inference.smc import evidence
from probkit.models.language import Budget, MarkovLM, Partial, Prefix, Steps

LONG = Steps(stop=(), max_tokens=1, max_steps=12)


def texts(post):
    return [[p.text for p in row] for row in post.particles.particles]


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("limit", "per_step"),
    [("completion_tokens", 8), ("tokens", 200), ("calls", 1)],
)
def test_a_budget_is_passed_by_one_step_at_most(limit, per_step):
    budget = Budget(**{limit: 5 if limit == "calls" else 30})
    lm = chain(0.05)
    model = model_of(Local(), lm=lm, steps=LONG, budget=budget)
    post = infer(model, PROMPT, ParticleFilter(8), rng=0, chains=2)
    for usage, reason in zip(post.attrs["usage"], post.attrs["stopped"], strict=True):
        spent = usage["prompt_tokens"] + usage["completion_tokens"]
        spent = spent if limit == "tokens" else usage[limit]
        assert getattr(budget, limit) <= spent < getattr(budget, limit) + per_step
        assert reason == f"budget: {limit}: {spent} of {getattr(budget, limit)} used"
    total = post.sample_stats["cost_completion_tokens"].sum()
    assert float(total) == sum(u["completion_tokens"] for u in post.attrs["usage"])
    assert torch.allclose(post.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert any(not p.finished for row in post.particles.particles for p in row)


def test_a_run_stopped_early_is_weighted_for_its_length():
    short = Steps(stop=(), max_tokens=1, max_steps=2)
    stopped = model_of(Prefixed(), budget=Budget(calls=2))
    truth = enumerate_target(model_of(Prefixed(), steps=short))
    post = infer(stopped, PROMPT, ParticleFilter(8, ess_threshold=1.0), rng=0, chains=100)
    assert abs(evidence_z(post, truth.log_evidence)) < 3.0
    assert posterior_z(post, truth) < 3.5


@pytest.mark.parametrize("sampler", [ParticleFilter(4), ParticleGibbs(4, draws=3, warmup=0)])
def test_nothing_is_begun_without_budget(sampler):
    lm = chain()
    post = infer(model_of(Local(), lm=lm, budget=Budget(seconds=0.0)), PROMPT, sampler, rng=0)
    assert lm.usage.calls == 0
    assert set(texts(post)[0]) == {""}
    assert post.attrs["stopped"] == ("budget: seconds: 0 of 0 used",)


def test_particle_gibbs_keeps_the_draws_that_its_budget_paid_for():
    model = model_of(Local(), steps=LONG, budget=Budget(calls=400))
    options = ParticleGibbs(3, draws=400, warmup=2)
    post = infer(model, PROMPT, options, rng=0, chains=2)
    drawn = (post.log_weights > -math.inf).sum(1)
    assert bool((drawn > 3).all()) and bool((drawn < 400).all())
    assert post.log_weights.shape[1] == int(drawn.max())
    assert torch.allclose(post.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))
    for usage, reason in zip(post.attrs["usage"], post.attrs["stopped"], strict=True):
        assert 400 <= usage["calls"] <= 404  # scores and a draw of one step
        assert reason.startswith("budget: calls")
    assert (
        len({name for name, v in post.sample_stats.items() if v.shape[1] != int(drawn.max())}) == 0
    )


def test_a_back_end_that_stops_leaves_the_particles_of_the_last_whole_step():
    lm = Flaky(chain(0.0), share=0.3, reason="budget", after=2)
    post = infer(model_of(Local(), lm=lm, steps=LONG), PROMPT, ParticleFilter(20), rng=0)
    assert {p.steps for p in post.particles.particles[0]} == {2}
    assert post.attrs["stopped"] == ("budget: the back end refused to go on",)
    assert post.sample_stats["steps_taken"].item() == 3
    gibbs = ParticleGibbs(3, draws=500, warmup=0)
    lm = Flaky(chain(0.0), share=0.3, reason="budget", after=100)
    post = infer(model_of(Local(), lm=lm), PROMPT, gibbs, rng=0)
    assert post.attrs["stopped"] == ("budget: the back end refused to go on",)
    assert 5 < post.log_weights.shape[1] < 60
    assert all(p.reason != "budget" for p in post.particles.particles[0])


# ---------------------------------------------------------------- failures


def test_failed_requests_are_drawn_again_without_changing_the_target():
    model = model_of(Prefixed(), lm=Flaky(chain(), share=0.1))
    truth = enumerate_target(model_of(Prefixed()))
    post = infer(model, PROMPT, ParticleFilter(8), rng=0, chains=100)
    assert posterior_z(post, truth) < 3.5
    assert abs(evidence_z(post, truth.log_evidence)) < 3.0  # lost: one in ten thousand steps


def test_failed_requests_may_be_dropped():
    lm = Flaky(chain(0.0), share=0.3)
    model = model_of(Local(), lm=lm, on_failure="drop")
    post = infer(model, PROMPT, ParticleFilter(40, ess_threshold=0.0), rng=0)
    dropped = [p for p in post.particles.particles[0] if p.reason == "failed"]
    assert 10 < len(dropped) < 40 and all(p.dead for p in dropped)
    weights = post.log_weights[0].exp().tolist()
    pairs = zip(post.particles.particles[0], weights, strict=True)
    assert all((w == 0.0) == p.dead for p, w in pairs)
    assert f"failed: {len(dropped)} of 40 answers were dropped" in post.attrs["stopped"][0]


def test_a_back_end_that_always_fails_gives_evidence_zero():
    model = model_of(Local(), lm=Flaky(chain(), share=1.1))
    post = infer(model, PROMPT, ParticleFilter(4), rng=0)
    assert post.log_evidence.value.tolist() == [-math.inf]
    assert post.attrs["stopped"][0].startswith("extinct")


# ---------------------------------------------------------------- extinction


class NeverTwice:
    """Forbids every second symbol."""

    def log_step(self, prefixes, steps):
        return torch.tensor([-math.inf if p.text else -0.5 for p in prefixes]).double()


def test_when_all_die_the_last_viable_population_comes_back():
    lm = chain(0.0)
    post = infer(model_of(NeverTwice(), lm=lm), PROMPT, ParticleFilter(6), rng=0, chains=3)
    assert post.log_evidence.value.tolist() == [-math.inf] * 3
    assert {p.steps for row in post.particles.particles for p in row} == {1}
    assert all(p.log_potential == -0.5 for row in post.particles.particles for p in row)
    assert post.sample_stats["extinct_at"].tolist() == [1, 1, 1]
    assert post.attrs["stopped"][0] == "extinct: every particle has weight zero after step 1"
    assert lm.usage.calls == 6
    found = evidence(post)
    assert found.log_mean == -math.inf


def test_particle_gibbs_reports_extinction_too():
    sampler = ParticleGibbs(3, draws=4, warmup=3)
    post = infer(model_of(NeverTwice(), lm=chain(0.0)), PROMPT, sampler, rng=0)
    assert post.attrs["stopped"][0].startswith("extinct")
    assert {p.steps for p in post.particles.particles[0]} == {1}
    assert float(post.log_weights.exp().sum()) == pytest.approx(1.0)


# ---------------------------------------------------------------- early ends, seeds, files


def test_runs_end_when_all_answers_are_finished():
    lm = chain(0.5)
    model = model_of(Local(), lm=lm, steps=Steps(stop=(), max_tokens=1, max_steps=200))
    post = infer(model, PROMPT, ParticleFilter(6), rng=0, chains=4)
    taken = post.sample_stats["steps_taken"]
    assert len(set(taken.tolist())) > 1 and int(taken.max()) < 60
    assert all(p.finished for row in post.particles.particles for p in row)
    assert post.attrs["stopped"] == ("",) * 4
    for name in ("ess", "log_evidence_trace", "unique_ancestors"):
        trace = post.sample_stats[name]
        assert trace.shape == (4, int(taken.max()))
        for row, steps in zip(trace, taken.tolist(), strict=True):
            assert bool((row[steps - 1 :] == row[steps - 1]).all())
    for row, steps in zip(post.sample_stats["cost_calls"], taken.tolist(), strict=True):
        assert row.tolist() == [1.0] * steps + [0.0] * (len(row) - steps)


@pytest.mark.parametrize("sampler", [ParticleFilter(6), ParticleGibbs(3, draws=5, warmup=1)])
def test_equal_seeds_give_equal_runs(sampler):
    runs = [infer(model_of(Prefixed()), PROMPT, sampler, rng=5, chains=2) for _ in range(2)]
    assert runs[0].particles.particles == runs[1].particles.particles
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    for name, value in runs[0].sample_stats.items():
        assert torch.equal(value, runs[1].sample_stats[name])
    alone = infer(model_of(Prefixed()), PROMPT, sampler, rng=5)
    assert alone.particles.particles[0] == runs[0].particles.particles[0]
    other = infer(model_of(Prefixed()), PROMPT, sampler, rng=6, chains=2)
    assert other.particles.particles != runs[0].particles.particles


@pytest.mark.parametrize("sampler", [ParticleFilter(6), ParticleGibbs(3, draws=6, warmup=1)])
def test_an_interrupted_run_is_resumed_to_the_last_bit(sampler, tmp_path):
    model = model_of(Local(), steps=LONG)
    whole = infer(model, PROMPT, sampler, rng=1, chains=2)
    stop_at = 4
    infer(
        model,
        PROMPT,
        sampler,
        rng=1,
        chains=2,
        checkpoint=tmp_path,
        callbacks=[lambda info: info.step >= stop_at],
    )
    resumed = infer(model, PROMPT, sampler, rng=1, chains=2, checkpoint=tmp_path)
    assert resumed.particles.particles == whole.particles.particles
    assert torch.equal(resumed.log_weights, whole.log_weights)
    for name, value in whole.sample_stats.items():
        assert torch.equal(value, resumed.sample_stats[name]), name


def test_posteriors_are_saved_and_loaded(tmp_path):
    model = model_of(Local())
    post = infer(model, PROMPT, ParticleFilter(5), rng=0, chains=2)
    post.save(tmp_path)
    found = pk.load(tmp_path, model=model)
    assert found.particles.particles == post.particles.particles
    assert found.attrs["stopped"] == post.attrs["stopped"]
    dead = Partial(Prefix("a", (1, 2), 1, "b"), log_potential=-math.inf, log_increment=-math.inf)
    assert pk.files.unpack(*pk.files.pack([dead])) == [dead]


def test_evidence_has_an_error_bar():
    truth = enumerate_target(model_of(Prefixed()))
    post = infer(model_of(Prefixed()), PROMPT, ParticleFilter(30), rng=0, chains=20)
    found = evidence(post)
    assert found.chains == 20 and 0.0 < found.relative_error < 0.1
    gap = math.exp(found.log_mean - truth.log_evidence) - 1.0
    assert abs(gap) < 3 * found.relative_error


# ---------------------------------------------------------------- export


def test_export_to_arviz():
    post = infer(model_of(Local()), PROMPT, ParticleFilter(7), rng=0, chains=2)
    with pytest.raises(DataError, match="exporting weighted draws"):
        post.to_datatree()
    tree = post.to_datatree(draws=50, rng=0)
    stats, draws = tree["sample_stats"], tree["posterior"]
    assert stats["log_weights"].dims == ("chain", "particle")
    assert stats["text"].values.tolist() == texts(post)
    for name in ("ess", "unique_ancestors", "log_evidence_trace", "cost_completion_tokens"):
        assert stats[name].dims == ("chain", "step")
    assert dict(draws.sizes) == {"chain": 2, "draw": 50}
    assert {"log_potential", "n_tokens", "n_steps", "finished"} <= set(draws.data_vars)
    weights = post.log_weights.exp()
    expected = weights * torch.tensor([[p.steps for p in r] for r in post.particles.particles])
    gap = draws["n_steps"].mean("draw").values - expected.sum(1).numpy()
    assert abs(gap).max() <= 3 * 7 / 50  # each particle appears within one of 50 w times
    arviz = pytest.importorskip("arviz")
    assert "n_steps" in arviz.summary(post.to_arviz(draws=50, rng=0)).index
    gibbs = infer(model_of(Local()), PROMPT, ParticleGibbs(2, draws=4, warmup=0), rng=0)
    assert gibbs.to_datatree()["sample_stats"]["renewed"].shape == (1, 4, 3)


def test_a_second_model_as_proposal_is_metered_too():
    other = MarkovLM([0.3, 0.3, 0.4], [[0.3, 0.3, 0.4]] * 3, end=0.3)
    lm = chain()
    post = infer(model_of(Local(), lm=lm, proposal=other), PROMPT, ParticleFilter(4), rng=0)
    calls = post.attrs["usage"][0]["calls"]
    assert calls == lm.usage.calls + other.usage.calls and lm.usage.calls > 0
