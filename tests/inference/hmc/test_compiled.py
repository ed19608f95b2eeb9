"""Compiled transitions: their pieces against the eager code, runs both ways, and falling back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.distributions import HalfCauchy, Normal, constraints

from probkit import DataError, infer
from probkit.inference.hmc import HMC, NUTS, engine, lockstep, proposal
from probkit.inference.hmc.leapfrog import Phase, Point, trajectory
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.program import compiler_found
from probkit.inference.hmc.tree import draw_tree, uniforms_needed
from probkit.model import Model, Site

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")

needs_compiler = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler here")


def funnel(position):
    """Curved in places, a normal in others; +inf beyond 50, as :class:`Potential` has it."""
    first, rest = position[:, 0], position[:, 1:]
    weight = (-0.5 * first).exp()
    energy = 0.5 * first.square() + 0.5 * (weight[:, None] * rest.square()).sum(-1)
    slope = first - 0.25 * weight * rest.square().sum(-1)
    gradient = torch.cat([slope[:, None], weight[:, None] * rest], dim=1)
    bad = ~(energy < 50.0)
    return energy.masked_fill(bad, torch.inf), gradient.masked_fill(bad[:, None], 0.0)


def begin(generator, chains=12, size=4):
    position = 0.5 * torch.randn(chains, size, generator=generator, dtype=torch.float64)
    momentum = torch.randn(chains, size, generator=generator, dtype=torch.float64)
    return Point(position, *funnel(position)), momentum


def metrics():
    root = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.8, 0, 0], [0, 0.2, 1.1, 0], [0.1, 0, 0, 0.9]])
    return [
        Metric(torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)),
        Metric((root @ root.T).double()),
    ]


def steps():
    """Step sizes [12] of trees of many depths, one of them wild."""
    step = 0.02 * 2.0 ** (torch.arange(12, dtype=torch.float64) % 6)
    step[7] = 300.0
    return step


def tree_gap(metric, generator, max_depth):
    """Largest difference between the eager tree and the one made of pieces, over all numbers."""
    point, momentum = begin(generator)
    count = uniforms_needed(max_depth)
    uniforms = torch.rand(12, count, generator=generator, dtype=torch.float64)
    rest = (metric, point, momentum, steps(), uniforms, max_depth)
    eager = draw_tree(funnel, *rest)
    pieces = lockstep.LockstepTree(lockstep.pieces(funnel)).draw(*rest)
    assert eager.stats.keys() == pieces.stats.keys()
    ours = [*eager.point, *eager.stats.values()]
    others = [*pieces.point, *pieces.stats.values()]
    gaps = [
        torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max()
        for a, b in zip(ours, others, strict=True)
    ]
    return float(torch.stack(gaps).max()), eager.stats


@pytest.mark.parametrize("metric", metrics(), ids=["diagonal", "dense"])
@pytest.mark.parametrize("max_depth", [2, 3, 7])
def test_the_tree_of_pieces_is_the_eager_tree(metric, max_depth, generator):
    gap, stats = tree_gap(metric, generator, max_depth)
    # Some hundred steps of rounding at 1e-16, of numbers of order ten.
    assert gap < 1e-9
    assert stats["diverging"].tolist() == [k == 7 for k in range(12)]
    assert max_depth < 7 or len(set(stats["tree_depth"].tolist())) > 3


MUTANTS = {
    "no U-turn inside a branch": ("_turned", lambda a, b, c: torch.zeros_like(a[0]) > 0),
    "no U-turn at joints": ("_joint_turns", lambda a, b: torch.zeros_like(a.first[0]) > 0),
    "direction reversed": ("_start_branch", None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_that_test_sees_a_wrong_piece(mutant, generator, monkeypatch):
    name, wrong = MUTANTS[mutant]
    if wrong is None:
        original = lockstep._start_branch
        wrong = lambda tree, direction: original(tree, 1.0 - direction)  # noqa: E731
    monkeypatch.setattr(lockstep, name, wrong)
    assert tree_gap(metrics()[0], generator, 7)[0] > 1e-3


def path_gap(metric, generator, count):
    point, momentum = begin(generator)
    step, uniform = steps(), torch.rand(12, generator=generator, dtype=torch.float64)
    start = Phase(point, momentum)
    end = trajectory(funnel, metric, start, step[:, None], count)
    settled = proposal.settle(start, end, uniform)
    blocked = proposal.BlockedPath(proposal.pieces(funnel))
    other_end, other = blocked.propose(metric, start, step, count, uniform)
    ours = [end.point.position, end.point.energy, end.momentum, *settled.point, *settled[1:]]
    others = [
        *(other_end.point.position, other_end.point.energy, other_end.momentum),
        *(*other.point, *other[1:]),
    ]
    gaps = [
        torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max()
        for a, b in zip(ours, others, strict=True)
    ]
    return float(torch.stack(gaps).max())


@pytest.mark.parametrize("metric", metrics(), ids=["diagonal", "dense"])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_the_path_of_pieces_is_the_eager_path(metric, count, generator):
    assert path_gap(metric, generator, count) < 1e-9


def test_that_test_sees_an_accept_that_is_not_fused_rightly(generator, monkeypatch):
    original = proposal.settle
    point, momentum = begin(generator)
    start = Phase(point, momentum)
    blocked = proposal.BlockedPath(proposal.pieces(funnel))
    uniform = torch.rand(12, generator=generator, dtype=torch.float64)
    right = blocked.propose(metrics()[0], start, steps(), 3, uniform)[1].point.position
    # Acceptance by the potential alone, the kinetic energy forgotten.
    monkeypatch.setattr(
        proposal,
        "settle",
        lambda start, end, uniform: original(
            start._replace(momentum=0 * start.momentum),
            end._replace(momentum=0 * end.momentum),
            uniform,
        ),
    )
    wrong = blocked.propose(metrics()[0], start, steps(), 3, uniform)[1].point.position
    assert not torch.allclose(right, wrong)


@dataclass(frozen=True)
class Level(Model):
    """mean ~ N(0, 5), scale ~ HalfCauchy(2), y_i ~ N(mean, scale)."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"mean": Site((), constraints.real), "scale": Site((), constraints.positive)}

    def log_joint(self, values, data, *, scale=1.0):
        zero = data.new_zeros(())
        prior = Normal(zero, zero + 5.0).log_prob(values["mean"])
        prior = prior + HalfCauchy(zero + 2.0).log_prob(values["scale"])
        law = Normal(values["mean"][..., None], values["scale"][..., None])
        return prior + law.log_prob(data).sum(-1)


@dataclass(frozen=True)
class Branching(Level):
    """The same, but it asks for a value: no graph can be recorded."""

    def log_joint(self, values, data, *, scale=1.0):
        extra = 0.0 if bool((values["scale"] > 0).all()) else -1.0
        return super().log_joint(values, data, scale=scale) + extra


def observed():
    return torch.tensor([0.3, 1.2, -0.4, 2.2, 0.9], dtype=torch.float64)


def largest_gap(one, other):
    return max(float((one.draws[n] - other.draws[n]).abs().max()) for n in one.draws)


SAMPLERS = [
    HMC(30, warmup=0, step_size=0.3, length=3.0, chunk=7),
    NUTS(30, warmup=0, step_size=0.2, max_depth=5, chunk=7),
]


def with_compile(sampler, choice):
    from dataclasses import replace

    return replace(sampler, compile=choice)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_compiled_runs_repeat_eager_ones(sampler, tmp_path):
    eager = infer(Level(), observed(), with_compile(sampler, False), rng=0, chains=6)
    compiled = infer(Level(), observed(), with_compile(sampler, True), rng=0, chains=6)
    assert (eager.attrs["engine"], compiled.attrs["engine"]) == ("eager", "compiled")
    # Rounding grows along thirty transitions of some ten steps, but no decision lies that near.
    assert largest_gap(eager, compiled) < 1e-6
    for name, value in eager.sample_stats.items():
        torch.testing.assert_close(value, compiled.sample_stats[name], rtol=1e-6, atol=1e-6)
    again = infer(
        Level(), observed(), with_compile(sampler, True), rng=0, chains=6, checkpoint=tmp_path
    )
    assert largest_gap(compiled, again) == 0.0


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_what_cannot_be_compiled_runs_eagerly(sampler):
    eager = infer(Branching(), observed(), with_compile(sampler, False), rng=0, chains=3)
    asked = infer(Branching(), observed(), with_compile(sampler, True), rng=0, chains=3)
    assert asked.attrs["engine"] == "eager"
    assert largest_gap(eager, asked) == 0.0


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_without_a_compiler_runs_are_eager(sampler, monkeypatch):
    monkeypatch.setattr(engine, "compiler_found", lambda: False)
    asked = infer(Level(), observed(), with_compile(sampler, True), rng=0, chains=3)
    assert asked.attrs["engine"] == "eager"


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_programs_that_differ_are_not_used(sampler, monkeypatch):
    """The comparison at the start of a run, with pieces of another potential (not compiled)."""

    def other_potential(potential, maker, example):
        return maker(lambda q: tuple(1.001 * part for part in potential(q)))

    def same_potential(potential, maker, example):
        return maker(potential)

    for module in ("hmc", "nuts"):
        target = f"probkit.inference.hmc.{module}.make_pieces"
        monkeypatch.setattr(target, other_potential)
    monkeypatch.setattr(engine, "_BY_CONTENT", type(engine._BY_CONTENT)())
    asked = infer(Level(), observed(), with_compile(sampler, True), rng=0, chains=3)
    assert asked.attrs["engine"] == "eager"
    for module in ("hmc", "nuts"):
        monkeypatch.setattr(f"probkit.inference.hmc.{module}.make_pieces", same_potential)
    asked = infer(Level(), observed(), with_compile(sampler, True), rng=0, chains=3)
    assert asked.attrs["engine"] == ("compiled" if compiler_found() else "eager")


def test_a_transition_that_fails_is_made_eagerly(monkeypatch):
    calls = []

    def frail(potential, maker, example):
        def evaluate(q):
            calls.append(1)
            if len(calls) > 60:
                raise RuntimeError("the program failed")
            return potential(q)

        return maker(evaluate)

    monkeypatch.setattr("probkit.inference.hmc.hmc.make_pieces", frail)
    monkeypatch.setattr(engine, "compiler_found", lambda: True)
    monkeypatch.setattr(engine, "_BY_CONTENT", type(engine._BY_CONTENT)())
    eager = infer(Level(), observed(), with_compile(SAMPLERS[0], False), rng=0, chains=3)
    asked = infer(Level(), observed(), with_compile(SAMPLERS[0], True), rng=0, chains=3)
    assert len(calls) == 61 and asked.attrs["engine"] == "eager"
    assert largest_gap(eager, asked) < 1e-9


def test_auto_compiles_long_runs_only():
    assert not NUTS()._compiles and not HMC()._compiles
    assert NUTS(20_000)._compiles and HMC(9_500)._compiles
    assert not NUTS(20_000, compile=False)._compiles
    assert not NUTS(20_000, max_depth=1)._compiles


def test_a_step_of_its_own_says_that_it_compiles(monkeypatch):
    monkeypatch.setattr(engine, "compiler_found", lambda: False)
    seen = []
    sampler = with_compile(SAMPLERS[0], True)
    infer(Level(), observed(), sampler, rng=0, chains=2, callbacks=[seen.append])
    assert seen[0].stats == {"compiling": 1.0} and seen[0].kept == 0
    assert len(seen) == seen[-1].total == seen[-1].step


def test_compile_must_be_a_choice():
    with pytest.raises(DataError, match="expected compile True, False or 'auto', got 'fast'"):
        HMC(compile="fast")
