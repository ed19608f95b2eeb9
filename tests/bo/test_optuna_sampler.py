"""The sampler inside Optuna, run for real."""

from __future__ import annotations

import botorch  # noqa: F401  (its import changes settings of GPyTorch: before the tests)
import pytest

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState  # noqa: E402

from probkit.bo import ProbkitSampler  # noqa: E402
from probkit.bo.optuna_sampler import _axis  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def sampler(**options):
    return ProbkitSampler(**{"surrogate": "gp", "rng": 0, "initial": 5, **options})


@pytest.mark.parametrize(
    "distribution",
    [
        optuna.distributions.FloatDistribution(-1, 2),
        optuna.distributions.FloatDistribution(1e-4, 1, log=True),
        optuna.distributions.FloatDistribution(0.1, 0.9, step=0.2),
        optuna.distributions.IntDistribution(3, 9),
        optuna.distributions.IntDistribution(1, 1024, log=True),
        optuna.distributions.IntDistribution(2, 11, step=3),
        optuna.distributions.CategoricalDistribution(["a", None, 2, False]),
    ],
)
def test_every_value_goes_over_and_comes_back(distribution):
    axis = _axis(distribution)
    parameter = axis.parameter
    for code in [0.0, 0.3 * parameter.top, parameter.top]:
        value = axis.to_optuna(parameter.from_code(code))
        assert distribution._contains(distribution.to_internal_repr(value))
        again = axis.to_optuna(parameter.from_code(parameter.to_code(axis.from_optuna(value))))
        assert again == pytest.approx(value) if isinstance(value, float) else again == value


def test_a_mixed_study_finds_the_optimum_better_than_random():
    def objective(trial):
        x = trial.suggest_float("x", -1, 1)
        c = trial.suggest_categorical("c", ["a", "b"])
        return (x - 0.3) ** 2 + (c == "b")

    study = optuna.create_study(sampler=sampler(noise="none"))
    study.optimize(objective, n_trials=11)
    assert study.best_params["c"] == "a" and abs(study.best_params["x"] - 0.3) < 0.02


def test_directions_are_respected():
    study = optuna.create_study(direction="maximize", sampler=sampler(noise="none"))
    study.optimize(lambda t: -((t.suggest_float("x", -1, 1) - 0.5) ** 2), n_trials=9)
    assert abs(study.best_params["x"] - 0.5) < 0.05


def test_failed_and_pruned_trials_are_no_values():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if x > 0.5:
            trial.report(-100.0, 0)
            if trial.number % 2:
                raise optuna.TrialPruned
            raise ValueError("diverged")
        return -x

    study = optuna.create_study(sampler=sampler(noise="none"))
    study.optimize(objective, n_trials=12, catch=ValueError)
    later = study.trials[6:]
    assert sum(t.state == TrialState.COMPLETE for t in later) >= 2  # none, were -100 believed
    assert 0.4 < study.best_params["x"] <= 0.5


def test_constraints_are_kept():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        trial.set_constraint("limit", x - 0.6)
        return -x

    study = optuna.create_study(sampler=sampler(noise="none"))
    study.optimize(objective, n_trials=11)
    feasible = [t.params["x"] for t in study.trials if t.params["x"] <= 0.6]
    assert max(feasible) > 0.57


def test_running_trials_are_pending_for_others(tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(storage=storage, sampler=sampler(noise="none"))
    study.optimize(lambda t: t.suggest_float("x", -1, 1) ** 2, n_trials=6)
    first = study.ask()
    x = first.suggest_float("x", -1, 1)
    other = optuna.load_study(study_name=study.study_name, storage=storage, sampler=sampler())
    second = other.ask()
    assert abs(second.suggest_float("x", -1, 1) - x) > 1e-6


def test_two_objectives():
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler())

    def objective(trial):
        x = trial.suggest_float("x", -2, 2)
        return x**2, -((x - 1) ** 2)

    study.optimize(objective, n_trials=7)
    assert len(study.best_trials) >= 2


def test_parameters_of_some_trials_are_drawn_independently():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        return x + (trial.suggest_float("y", 0, 1) if trial.number % 2 else 0)

    study = optuna.create_study(sampler=sampler())
    study.optimize(objective, n_trials=7)
    assert len(study.trials) == 7


def test_the_same_seed_gives_the_same_trials():
    def run():
        study = optuna.create_study(sampler=sampler(noise="none"))
        study.optimize(lambda t: t.suggest_float("x", -1, 1) ** 2, n_trials=7)
        return [t.params["x"] for t in study.trials]

    assert run() == run()
