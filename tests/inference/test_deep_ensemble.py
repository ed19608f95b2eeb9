"""Deep ensembles: members together equal members alone, subsets, schedules and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro import distributions as dist
from support.fits import GroupModel, LineModel, RateModel, line_data
from torch.distributions import Normal, constraints

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference import MAP, DeepEnsemble
from probkit.model import Model, Site
from probkit.models import BNN, LogNormal
from probkit.sampler import Problem
from probkit.testing import SamplerConformance

GENERATOR = torch.Generator().manual_seed(3)
X = torch.rand(15, 2, generator=GENERATOR, dtype=torch.float64) * 2 - 1
Y = (2 * X[:, 0]).sin() + X[:, 1] ** 2
MODEL = BNN(hidden=(6,), noise_var=LogNormal(-3.0, 0.5))


class TestConformance(SamplerConformance):
    def problem(self):
        sampler = DeepEnsemble(members=3, steps=40, chunk=10, lr=0.02)
        return sampler, BNN(hidden=(4,), noise_var=0.1), (X, Y)


def _run(sampler, state, problem):
    done = False
    while not done:
        step = sampler.step(problem, state, rngs=())
        state, done = step.state, step.done
    return state


def _start(sampler, model, data):
    problem = Problem(model, model.prepare(data))
    return problem, sampler.init(problem, rngs=[torch.Generator().manual_seed(0)])


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_members_together_equal_members_alone(fraction):
    sampler = DeepEnsemble(members=4, steps=60, lr=0.05, fraction=fraction)
    problem, state = _start(sampler, MODEL, (X, Y))
    together = _run(sampler, state, problem)["flat"]
    for k in range(4):
        alone = {**state, "flat": state["flat"][k : k + 1]}
        if state["index"] is not None:
            alone["index"] = state["index"][k : k + 1]
        # Adam divides by root v: rounding differences of 1e-16 grow by a few orders at most.
        found = _run(sampler, alone, problem)["flat"]
        torch.testing.assert_close(found, together[k : k + 1], rtol=0, atol=1e-10)


def test_a_member_is_the_fit_to_its_own_rows():
    """The subset objective is that of the model given those rows, likelihood scaled up."""
    sampler = DeepEnsemble(members=2, steps=25, lr=0.05, fraction=0.6)
    problem, state = _start(sampler, MODEL, (X, Y))
    found = _run(sampler, state, problem)["flat"][1]
    rows = state["index"][1]
    assert len(rows) == 9 and len(set(rows.tolist())) == 9
    assert set(rows.tolist()) != set(state["index"][0].tolist())
    flat = state["flat"][1].clone().requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=0.05)
    free = pk.Unconstrained(MODEL.sites((X, Y)))
    for t in range(25):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * t / 25))
        optimizer.zero_grad()
        values = free.values(flat)
        part = (X[rows], Y[rows])
        loss = -MODEL.log_prior(values) - (15 / 9) * MODEL.log_likelihood(values, part)
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found, flat.detach(), rtol=0, atol=1e-10)


def test_the_first_members_do_not_depend_on_how_many_follow():
    few = pk.infer(MODEL, (X, Y), DeepEnsemble(members=2, steps=20), rng=5)
    many = pk.infer(MODEL, (X, Y), DeepEnsemble(members=4, steps=20), rng=5)
    for name, value in few.draws.items():
        torch.testing.assert_close(many.draws[name][:, :2], value, rtol=0, atol=1e-12)


def test_a_concave_problem_has_one_answer():
    """All members given all data reach the one mode, that of the closed form."""
    post = pk.infer(
        LineModel(), line_data(), DeepEnsemble(members=3, steps=700, lr=0.1, fraction=1.0), rng=0
    )
    mean, _, _ = LineModel().exact(line_data())
    torch.testing.assert_close(post.draws["w"][0], mean.expand(3, 2), rtol=0, atol=1e-4)
    assert post.attrs["ensemble"] is True and not post.is_point_estimate


def test_one_member_is_a_point_estimate_and_agrees_with_map():
    options = DeepEnsemble(members=1, steps=700, lr=0.1, fraction=1.0)
    post = pk.infer(RateModel(), torch.tensor([0.3, 1.2, 0.1, 0.8]).double(), options, rng=0)
    exact = pk.infer(RateModel(), torch.tensor([0.3, 1.2, 0.1, 0.8]).double(), MAP(), rng=0)
    assert post.is_point_estimate
    assert float(post.draws["rate"]) == pytest.approx(float(exact.draws["rate"]), abs=1e-5)


@pytest.mark.parametrize("jacobian", [False, True])
def test_the_jacobian_moves_the_mode(jacobian):
    data = torch.tensor([0.3, 1.2, 0.1, 0.8]).double()
    a, b = RateModel().exact(data)
    sampler = DeepEnsemble(members=2, steps=700, lr=0.1, jacobian=jacobian)
    post = pk.infer(RateModel(), data, sampler, rng=0)
    expected = (a - (0.0 if jacobian else 1.0)) / b
    torch.testing.assert_close(
        post.draws["rate"][0], torch.full((2,), float(expected)).double(), rtol=0, atol=1e-4
    )


def test_models_with_local_sites_show_all_units():
    post = pk.infer(
        GroupModel(), torch.tensor([0.3, 1.2, 0.1]).double(), DeepEnsemble(2, 20), rng=0
    )
    assert post.attrs["fraction"] == 1.0


def test_the_share_that_was_used_is_on_record():
    post = pk.infer(MODEL, (X, Y), DeepEnsemble(members=2, steps=10, fraction=0.5), rng=0)
    assert post.attrs["fraction"] == pytest.approx(8 / 15)
    assert post.sample_stats["lp"].shape == (1, 2)
    expected = MODEL.log_joint({k: v[0, 1] for k, v in post.draws.items()}, (X, Y))
    torch.testing.assert_close(post.sample_stats["lp"][0, 1], expected)


def test_pyro_programs_can_be_fitted():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
        with pyro.plate("unit", len(y)):
            pyro.sample("y", dist.Normal(mu, y.new_ones(())), obs=y)

    y = torch.tensor([0.3, 1.2, 0.1, 0.8]).double()
    model = pk.FromPyro(program, observed=("y",))
    post = pk.infer(model, {"y": y}, DeepEnsemble(members=3, steps=500, lr=0.1), rng=0)
    mean = y.sum() / (len(y) + 1 / 9)
    torch.testing.assert_close(post.draws["mu"][0], mean.expand(3), rtol=0, atol=1e-4)


def test_the_spread_grows_away_from_the_data():
    x = torch.linspace(-1, 1, 20).double()[:, None]
    model = BNN(hidden=(20,), noise_var=0.01)
    post = pk.infer(model, (x, (3 * x[:, 0]).sin()), DeepEnsemble(steps=400), rng=1)
    spread = post.predict(torch.tensor([[0.0], [4.0]]).double(), site="f").variance
    assert float(spread[1]) > 10 * float(spread[0])


@storable
@dataclass(frozen=True)
class Wall(Model):
    """A density that is zero for x < ``bound``."""

    bound: float = 0.0

    def sites(self, data):
        return {"x": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        x = values["x"]
        inside = Normal(x.new_tensor(1.0), 1.0).log_prob(x)
        return torch.where(x > self.bound, inside, -torch.inf)


def test_starts_of_zero_density_are_drawn_again():
    post = pk.infer(Wall(1.0), None, DeepEnsemble(members=4, steps=5, lr=1e-3), rng=0)
    assert bool((post.draws["x"] > 1.0).all())


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="-inf at all 20 starting points of member 0"):
        pk.infer(Wall(9.0), None, DeepEnsemble(members=2, steps=5), rng=0)
    with pytest.raises(DataError, match="member 0 is no longer finite at step 5; lower lr=1000"):
        pk.infer(Wall(-2.0), None, DeepEnsemble(members=1, steps=5, lr=1000.0), rng=0)
    with pytest.raises(DataError, match="whole members, steps and chunk >= 1, got 0"):
        DeepEnsemble(members=0)
    with pytest.raises(DataError, match=r"0 < fraction <= 1, got 0.01, 1.5"):
        DeepEnsemble(fraction=1.5)
    with pytest.raises(DataError, match="schedule 'cosine' or 'constant', got 'step'"):
        DeepEnsemble(schedule="step")


@dataclass(frozen=True)
class NoSites(Model):
    def sites(self, data):
        return {}

    def log_joint(self, values, data, *, scale=1.0):
        return torch.zeros(())


def test_a_model_without_sites_is_refused():
    with pytest.raises(CapabilityError, match="NoSites has no sites to optimise"):
        pk.infer(NoSites(), None, DeepEnsemble(), rng=0)
