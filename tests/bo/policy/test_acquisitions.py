"""Acquisition functions for surrogates of every form, and what is refused."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.acquisition.multi_objective import logei

import probkit as pk
from probkit.bo.domain import Domain
from probkit.bo.policy import Goal, acquisition_for, allowed_acquisitions
from probkit.bo.policy.abilities import ACQUISITIONS, Abilities, abilities_of
from probkit.bo.surrogates import make_surrogate

SMALL = {
    "ensemble": {"hidden": (6,), "steps": 30, "members": 8},
    "nngp": {"depth": 1, "learn": False},
    "laplace": {"hidden": (6,), "steps": 60},
}
FORMS = {"gp": "normal", "laplace": "normal", "nngp": "student", "ensemble": "draws"}


def _data(outputs=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(10, 2, generator=generator).double()
    y = torch.stack([x.sum(1).sin(), -x[:, 0], x[:, 1] - 0.5], 1)
    return x, y[:, :outputs]


def _model(name, outputs=1):
    x, y = _data(outputs)
    return make_surrogate(name, x, y, options=SMALL.get(name), rng=0), x, y


@pytest.mark.parametrize("name", FORMS)
def test_every_allowed_acquisition_of_one_objective_works(name):
    model, x, y = _model(name)
    abilities = abilities_of(model, x)
    assert abilities.posterior == FORMS[name] and abilities.outputs == 1
    allowed = allowed_acquisitions(abilities, Goal())
    assert {"q_log_ei", "q_log_nei", "q_ucb", "q_simple_regret"} <= set(allowed)
    assert ("kg" in allowed) == (name in ("gp", "laplace"))
    before = torch.get_rng_state()
    for kind in allowed:
        acquisition = acquisition_for(model, X=x, Y=y, acquisition=kind, samples=16, rng=0)
        q = 17 if kind == "kg" else 1  # One-shot: fantasies are points of their own.
        at = (x[:2, None] * 0.9).expand(2, q, 2)
        value = acquisition(at)
        assert value.shape == (2,) and bool(torch.isfinite(value).all()), kind
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gp", "LogExpectedImprovement"), ("nngp", "LogStudentTExpectedImprovement"),
     ("ensemble", "qLogExpectedImprovement"), ("laplace", "LogExpectedImprovement")],
)  # fmt: skip
def test_auto_takes_what_fits(name, expected):
    model, x, y = _model(name)
    assert type(acquisition_for(model, X=x, Y=y, rng=0)).__name__ == expected
    batch = acquisition_for(model, X=x, Y=y, q=3, rng=0)
    kind = "qLogNoisyExpectedImprovement" if FORMS[name] == "normal" else "qLogExpectedImprovement"
    assert type(batch).__name__ == kind


def test_the_incumbent_of_noisy_outcomes_is_a_posterior_mean():
    model, x, y = _model("gp")
    y = y + 0.3  # Luck that the surrogate does not share.
    noisy = acquisition_for(model, X=x, Y=y, rng=0)
    exact = acquisition_for(model, X=x, Y=y, exact=True, rng=0)
    assert isinstance(noisy, LogExpectedImprovement)
    assert float(exact.best_f) == pytest.approx(float(y.max()))
    assert float(noisy.best_f) == pytest.approx(float(model.posterior(x).mean.max()))


def test_constraints_multiply_improvement_by_feasibility():
    model, x, y = _model("gp", 3)
    goal = Goal((0,), [(1, 1.0, -0.2), (2, -1.0, 0.1)])
    assert goal.feasible(y).tolist() == ((y[:, 1] <= -0.2) & (y[:, 2] >= -0.1)).tolist()
    acquisition = acquisition_for(model, goal, X=x, Y=y, exact=True, rng=0)
    at = x[:4, None] * 0.9
    best = y[goal.feasible(y), 0].max()
    improvement = LogExpectedImprovement(model.subset_output([0]), best)(at)
    chance = torch.zeros(4).double()
    for column, sign, bound in goal.constraints:
        posterior = model.subset_output([column]).posterior(at)
        z = (bound - sign * posterior.mean.flatten()) / posterior.variance.sqrt().flatten()
        chance = chance + torch.special.log_ndtr(z)
    torch.testing.assert_close(acquisition(at), improvement + chance, rtol=1e-5, atol=1e-5)


def test_feasibility_alone_counts_before_any_point_is_feasible():
    model, x, y = _model("gp", 2)
    goal = Goal((0,), [(1, 1.0, -5.0)])
    acquisition = acquisition_for(model, goal, X=x, Y=y, rng=0)
    posterior = model.subset_output([1]).posterior(x[:3, None])
    z = (-5.0 - posterior.mean.flatten()) / posterior.variance.sqrt().flatten()
    expected = torch.special.log_ndtr(z)
    torch.testing.assert_close(acquisition(x[:3, None]), expected, rtol=1e-5, atol=1e-6)
    batch = acquisition_for(model, goal, X=x, Y=y, q=2, samples=8, rng=0)
    assert bool(torch.isfinite(batch(x[:2, None])).all())


@pytest.mark.parametrize("name", ["gp", "ensemble"])
def test_several_objectives_are_traded_off_without_a_compiler(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr("torch.utils.cpp_extension.load", refuse)
    model, x, y = _model(name, 2)
    goal = Goal((0, 1))
    for kind in ("auto", "q_log_ehvi", "q_log_nehvi", "parego"):
        acquisition = acquisition_for(model, goal, X=x, Y=y, acquisition=kind, samples=8, rng=0)
        with pk.scope(rng=0):
            value = acquisition(x[:3, None] * 0.9)
        assert value.shape == (3,) and bool(torch.isfinite(value).all())
    assert logei._C is None and not logei._load_attempted


def test_the_reference_point_is_below_the_front():
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-5.0, -5.0]]).double()
    assert Goal((0, 1)).reference_point(y).tolist() == pytest.approx([-0.1, -0.1])
    assert Goal((0, 1), reference=[-2.0, -3.0]).reference_point(y).tolist() == [-2.0, -3.0]


def test_fidelity_is_bought_where_it_pays():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 2, generator=generator).double()
    y = (x[:, :1] * 3).sin() * (0.5 + 0.5 * x[:, 1:])
    domain = Domain(torch.tensor([[0.0, 0.1], [1.0, 1.0]]), fidelity=1)
    x[:, 1] = 0.1 + 0.9 * x[:, 1]
    model = make_surrogate("gp", x, y, bounds=domain, rng=0)
    values = []
    for slope in (1.0, 4.0):
        cost = {"fixed": 0.0, "slope": slope}
        with pk.scope(rng=0):
            acquisition = acquisition_for(
                model, X=x, Y=y, acquisition="mf_mes", bounds=domain, cost=cost, rng=0
            )
            values.append(acquisition(x[:1, None]))
    torch.testing.assert_close(values[0], 4 * values[1], rtol=1e-6, atol=1e-12)
    auto = acquisition_for(model, X=x, Y=y, bounds=domain, rng=0)
    assert type(auto).__name__ == "qMultiFidelityKnowledgeGradient"
    assert auto(x[:1, None].expand(1, 17, 2)).shape == (1,)
    with pytest.raises(pk.DataError, match="cost: expected 'fixed' and 'slope', got"):
        acquisition_for(model, X=x, Y=y, bounds=domain, cost={"a": 1}, rng=0)
    with pytest.raises(pk.DataError, match="a cost > 0 at the lowest fidelity 0.1"):
        acquisition_for(model, X=x, Y=y, bounds=domain, cost={"fixed": -1, "slope": 1}, rng=0)


def test_thompson_samples_are_functions():
    for name in ("gp", "ensemble"):
        model, x, y = _model(name)
        one = acquisition_for(model, X=x, Y=y, acquisition="thompson", rng=0)
        again = acquisition_for(model, X=x, Y=y, acquisition="thompson", rng=0)
        at = x[:5, None] * 0.9
        assert torch.equal(one(at), again(at))
        first = one(at)
        one.set_X_pending(x[:1])
        assert not torch.equal(first, one(at))
        one.set_X_pending(None)
        torch.testing.assert_close(one(at), first)
        if name == "ensemble":
            members = model.posterior(at).values.squeeze((-1, -2))
            assert bool(((members - first[:, None]).abs() < 1e-12).all(0).any())


def test_what_a_surrogate_cannot_do_is_named_with_what_it_can():
    model, x, y = _model("ensemble")
    with pytest.raises(pk.CapabilityError, match="'kg' does not fit PosteriorSurrogate here: it "
                       "needs a posterior that is normal, not draws; it needs a surrogate that can "
                       "be conditioned .* allowed are .*q_log_ei, q_log_nei"):  # fmt: skip
        acquisition_for(model, X=x, Y=y, acquisition="kg", rng=0)
    with pytest.raises(pk.CapabilityError, match="expected 'auto' or one of .* got 'best'"):
        acquisition_for(model, X=x, Y=y, acquisition="best", rng=0)
    gp, x, y = _model("gp", 2)
    with pytest.raises(pk.CapabilityError, match=r"takes one objective\(s\), not 2"):
        acquisition_for(gp, Goal((0, 1)), X=x, Y=y, acquisition="log_ei", rng=0)
    with pytest.raises(pk.CapabilityError, match="it cannot keep constraints"):
        acquisition_for(gp, Goal((0,), [(1, 1.0, 0.0)]), X=x, Y=y, acquisition="kg", rng=0)
    with pytest.raises(pk.CapabilityError, match="takes one point at a time, with none pending"):
        acquisition_for(gp, X=x, Y=y, acquisition="log_ei", X_pending=x[:1], rng=0)
    with pytest.raises(pk.CapabilityError, match="needs a domain with a column of fidelity"):
        acquisition_for(gp, X=x, Y=y, acquisition="mf_kg", rng=0)


def test_bad_arguments_are_named():
    model, x, y = _model("gp")
    with pytest.raises(pk.ShapeError, match=r"expected X \[row, feature\] and Y \[row, output\]"):
        acquisition_for(model, X=x, Y=y[:, 0], rng=0)
    with pytest.raises(pk.ShapeError, match=r"Y: expected \[row, output=1\]"):
        acquisition_for(model, X=x, Y=y.expand(10, 2), rng=0)
    with pytest.raises(pk.DataError, match="q: expected a whole number of points >= 1, got 0"):
        acquisition_for(model, X=x, Y=y, q=0, rng=0)
    with pytest.raises(pk.DataError, match=r"goal: expected columns in \[0, 1\)"):
        acquisition_for(model, Goal((1,)), X=x, Y=y, rng=0)
    with pytest.raises(pk.DataError, match="objectives: expected distinct columns"):
        Goal(())
    with pytest.raises(pk.ShapeError, match=r"reference: expected \[objective=2\]"):
        Goal((0, 1), reference=[1.0])
    with pytest.raises(pk.DataError, match="X_pending: expected values within the bounds"):
        acquisition_for(model, X=x, Y=y, X_pending=x[:1] + 9, rng=0)


def test_needs_are_consistent():
    """Whatever a surrogate offers, some acquisition function fits every kind of goal."""
    for form in ("normal", "student", "draws", "other"):
        abilities = Abilities(form, fantasies=False, outputs=3)
        for goal in (
            Goal(),
            Goal((0,), [(1, 1.0, 0.0)]),
            Goal((0, 1)),
            Goal((0, 1), [(2, 1.0, 0.0)]),
        ):
            for batch in (False, True):
                assert allowed_acquisitions(abilities, goal, batch=batch)
    assert len(ACQUISITIONS) == 19
