"""Problems: published values, brute force on small cases, and what is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

# Imports that change warning filters come before any test.
import sklearn.datasets
import sklearn.ensemble
import sklearn.model_selection
import sklearn.neighbors
import sklearn.neural_network
import sklearn.pipeline
import sklearn.preprocessing
import sklearn.svm  # noqa: F401
import torch
from botorch import test_functions  # noqa: F401

import probkit as pk
from probkit.bo.problems import (
    BNNDraw,
    PestControl,
    Polynomial,
    SklearnTuning,
    TableProblem,
    TestFunction,
)


@pytest.mark.parametrize(("action", "cost"), [(3, 12.28), (0, 21.95)])
def test_pest_control_has_the_published_costs(action, cost):
    found = PestControl()({f"stage_{k}": action for k in range(25)})
    assert round(found["cost"], 2) == cost


def test_pest_control_mixes_actions_in_order():
    """A second, loop-free reckoning of three stages, by hand."""
    problem = PestControl(stages=3)
    draw = lambda a, b: np.random.RandomState(1).beta(a, b, size=100)  # noqa: E731
    first = draw(1.0, 30.0)
    second = first * (1 - draw(1.0, 3.0 / 7.0))  # pesticide 2
    third = second + draw(1.0, 17.0 / 3.0) * (1 - second)  # none
    exceeded = sum(float(np.mean(p > 0.1)) for p in (first, second, third))
    # Pesticide 2 twice in three stages: each at .8 (1 - .3 * 2 / 3).
    cost = 2 * 0.8 * (1 - 0.3 * 2 / 3) + exceeded
    assert problem({"stage_0": 2, "stage_1": 0, "stage_2": 2})["cost"] == pytest.approx(cost)
    other = problem({"stage_0": 0, "stage_1": 2, "stage_2": 2})["cost"]
    assert other != pytest.approx(cost)


def test_pests_grow_used_to_a_pesticide():
    problem = PestControl(stages=2)
    start = np.random.RandomState(1).beta(1.0, 30.0, size=100)
    once = start * (1 - np.random.RandomState(1).beta(1.0, 2 / 7, size=100))
    twice = once * (1 - np.random.RandomState(1).beta(1.0, 2 / 7 + 1 / 7 / 2, size=100))
    assert float(twice.mean()) < float(once.mean())
    exceeded = float((start > 0.1).mean() + (once > 0.1).mean())
    found = problem({"stage_0": 1, "stage_1": 1})["cost"]
    assert found == pytest.approx(2 * 1.0 * (1 - 0.2) + exceeded)


def test_the_best_value_of_a_polynomial_is_that_of_all_corners():
    problem = Polynomial(terms=3, degree=3, rng=4)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9))).double()
    assert problem.best == pytest.approx(float(problem.value(corners).min()), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(2000, 9, generator=generator).double()
    assert float(problem.value(inside).min()) >= problem.best
    params = {f"x{k}": float(inside[0, k]) for k in range(9)}
    expected = (inside[0].reshape(3, 3) - problem.centres).prod(0).sum()
    assert problem(params)["value"] == pytest.approx(float(expected))
    assert Polynomial(rng=0).features == 200
    assert problem.regret(problem(params)) == pytest.approx(float(expected) - problem.best)


def test_a_network_draw_is_its_weights():
    problem = BNNDraw(3, hidden=(4,), rng=2)
    (w0, b0), (w1, b1) = problem.layers
    x = torch.tensor([0.1, 0.5, 0.9]).double()
    expected = torch.tanh(x @ w0 + b0) @ w1 + b1
    assert problem({"x0": 0.1, "x1": 0.5, "x2": 0.9})["value"] == pytest.approx(float(expected))
    other = BNNDraw(3, hidden=(4,), rng=3)
    assert not torch.equal(other.layers[0][0], w0)
    assert torch.equal(BNNDraw(3, hidden=(4,), rng=2).layers[0][0], w0)
    assert BNNDraw().features == 400


def test_botorch_functions_are_minimised():
    branin = TestFunction("Branin")
    assert branin.regret(branin({"x1": np.pi, "x2": 2.275})) == pytest.approx(0, abs=1e-5)
    assert branin.regret(branin({"x1": 0.0, "x2": 0.0})) > 50
    both = TestFunction("BraninCurrin")
    assert list(both.outcomes.objectives.values()) == ["min", "min"]
    found = both({"x1": 0.5, "x2": 0.5})
    exact = both.function.evaluate_true(torch.tensor([[0.5, 0.5]]).double())[0]
    assert [found["f1"], found["f2"]] == pytest.approx(exact.tolist())
    assert both.reference == {"f1": 18.0, "f2": 6.0}
    constrained = TestFunction("PressureVessel")
    low, high = constrained.function.bounds.double()
    point = 0.3 * low + 0.7 * high
    found = constrained.evaluate(dict(zip(constrained.space.names, point.tolist(), strict=True)))
    slacks = constrained.function.evaluate_slack_true(point[None])[0]
    assert [found[f"c{k + 1}"] for k in range(4)] == pytest.approx(slacks.tolist())
    assert constrained.outcomes.is_feasible(found) == bool((slacks >= 0).all())


@pytest.fixture
def table(tmp_path):
    """Two by three configurations of three seeds, one seed missing."""
    values = np.arange(18, dtype=np.float32).reshape(6, 3)
    values[1, 2] = np.nan
    meta = {
        "dataset": "toy",
        "metric": "acc",
        "direction": "maximize",
        "names": ["act", "lr"],
        "choices": {"act": ["relu", "tanh"], "lr": [0.01, 0.1, 1]},
        "types": {"act": "str", "lr": "float"},
    }
    path = tmp_path / "toy.npz"
    np.savez(path, values=values, meta=json.dumps(meta), model_size=np.arange(6.0))
    return path


def test_a_table_is_looked_up_row_by_row(table):
    problem = TableProblem(table)
    assert problem({"act": "tanh", "lr": 0.1})["acc"] == pytest.approx(13.0)  # row 4
    assert problem({"act": "relu", "lr": 0.1})["acc"] == pytest.approx(3.5)  # without the NaN
    assert problem.best == 16.0
    assert problem.regret(problem({"act": "relu", "lr": 0.01})) == pytest.approx(15.0)
    assert problem.outcomes.objectives == {"acc": "max"}
    both = TableProblem(table, size=True)
    assert both({"act": "tanh", "lr": 0.1}) == {"acc": 13.0, "model_size": 4.0}


def test_noisy_evaluations_are_seeds_of_the_row(table):
    problem = TableProblem(table, noise=True, rng=0)
    found = {problem({"act": "relu", "lr": 0.1})["acc"] for _ in range(40)}
    assert found == {3.0, 4.0}
    again = TableProblem(table, noise=True, rng=0)
    first = [again({"act": "tanh", "lr": 1})["acc"] for _ in range(5)]
    again = TableProblem(table, noise=True, rng=0)
    assert first == [again({"act": "tanh", "lr": 1})["acc"] for _ in range(5)]


def test_tuning_a_model_is_its_cross_validation():
    from sklearn.datasets import load_iris
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    problem = SklearnTuning("svm", "iris")
    found = problem({"C": 0.5, "kernel": "rbf", "gamma": 0.2})["loss"]
    X, y = load_iris(return_X_y=True)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    pipeline = make_pipeline(StandardScaler(), SVC(C=0.5, kernel="rbf", gamma=0.2, random_state=0))
    assert found == pytest.approx(1 - cross_val_score(pipeline, X, y, cv=folds).mean())
    assert problem({"C": 0.5, "kernel": "linear"})["loss"] < 0.2


@pytest.mark.parametrize("model", ["forest", "boosting", "network", "neighbours"])
def test_every_model_can_be_tuned(model):
    problem = SklearnTuning(model, "diabetes", rows=60, folds=2)
    params = problem.space.sobol(1, rng=0)[0]
    loss = problem(params)["loss"]
    assert loss > 0
    assert problem(params)["loss"] == loss


def test_bad_input_is_named(table, monkeypatch, tmp_path):
    with pytest.raises(pk.DataError, match="stages: expected a whole number >= 1, got 0"):
        PestControl(0)
    with pytest.raises(pk.DataError, match=r"degree in \[1, 16\], got 3, 20"):
        Polynomial(3, 20)
    with pytest.raises(pk.DataError, match=r"botorch.test_functions has no 'Brain'"):
        TestFunction("Brain")
    with pytest.raises(pk.DataError, match="to be minimised; leave negate out"):
        TestFunction("Branin", negate=True)
    with pytest.raises(pk.DataError, match="model: expected one of 'svm', .* got 'tree'"):
        SklearnTuning("tree")
    with pytest.raises(pk.DataError, match="data: expected one of 'digits', .* got 'mnist'"):
        SklearnTuning("svm", "mnist")
    with pytest.raises(pk.DataError, match="its best value is not known"):
        BNNDraw(2, hidden=(3,)).regret(1.0)
    monkeypatch.delenv("PROBKIT_DATA", raising=False)
    with pytest.raises(pk.DataError, match="set the environment variable PROBKIT_DATA"):
        TableProblem("phoneme")
    with pytest.raises(pk.DataError, match="no table at .*nowhere.npz"):
        TableProblem("nowhere.npz")
    np.savez(tmp_path / "other.npz", values=np.zeros((2, 1)))
    with pytest.raises(pk.DataError, match="expected arrays 'values' and 'meta'"):
        TableProblem(tmp_path / "other.npz")
    with pytest.raises(pk.DataError, match="act"):
        TableProblem(table)({"act": "gelu", "lr": 0.1})
