"""The pruner inside real Optuna studies."""

from __future__ import annotations

import copy
import math
import pickle

import optuna
import pytest
import sklearn.neural_network  # noqa: F401  (its import draws a random number)

from probkit.datasets import MLPRun
from probkit.errors import DataError
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.optuna_pruner import OptunaPruner

EPOCHS = 20


@pytest.fixture(autouse=True)
def quiet():
    """Optuna reports trials to stderr; its verbosity is put back afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def curve(final, t, rate=0.3):
    return final - (final - 0.2) * math.exp(-rate * t)


def run(study, finals, *, sign=1.0, first=0):
    """One trial for each final accuracy (or error, where ``sign`` is negative)."""
    waiting = iter(finals)

    def objective(trial):
        final = next(waiting)
        for t in range(1, EPOCHS + 1):
            value = curve(final, t)
            value = value if sign > 0 else 1 - value
            trial.report(value, t - 1 + first)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=len(finals))
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1.0), ("minimize", -1.0)])
def test_hopeless_trials_are_pruned_and_others_are_not(lc, direction, sign):
    study = optuna.create_study(direction=direction, pruner=OptunaPruner(EPOCHS, model=lc))
    states = run(study, [0.7, 0.3, 0.9, 0.35], sign=sign)
    assert states == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert all(2 <= len(t.intermediate_values) < 12 for t in study.trials[1::2])


def test_nothing_is_pruned_before_there_is_a_value_to_beat(lc):
    study = optuna.create_study(direction="maximize", pruner=OptunaPruner(EPOCHS, model=lc))
    assert run(study, [0.25]) == ["COMPLETE"]
    patient = optuna.create_study(
        direction="maximize", pruner=OptunaPruner(EPOCHS, model=lc, warmup=3)
    )
    assert run(patient, [0.9, 0.3, 0.3, 0.3]) == ["COMPLETE"] * 3 + ["PRUNED"]


def test_the_leader_is_never_pruned(lc):
    study = optuna.create_study(direction="maximize", pruner=OptunaPruner(EPOCHS, model=lc))
    assert run(study, [0.5, 0.51, 0.52]) == ["COMPLETE"] * 3


def test_steps_may_count_from_one(lc):
    pruner = OptunaPruner(EPOCHS, model=lc, first=1)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    assert run(study, [0.9, 0.3], first=1) == ["COMPLETE", "PRUNED"]


def test_a_trial_that_diverges_is_pruned(lc):
    study = optuna.create_study(direction="maximize", pruner=OptunaPruner(EPOCHS, model=lc))
    run(study, [0.9])
    trial = study.ask()
    trial.report(0.5, 0)
    trial.report(math.nan, 1)
    assert trial.should_prune()


def test_a_log_loss(lc):
    pruner = OptunaPruner(EPOCHS, normalizer=CurveNormalizer.log_loss(2.3), model=lc)
    study = optuna.create_study(direction="minimize", pruner=pruner)
    for final in (0.2, 2.1):
        trial = study.ask()
        for t in range(1, EPOCHS + 1):
            trial.report(final + (2.3 - final) * math.exp(-0.4 * t), t - 1)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, final)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"]


def test_networks_trained_in_a_study(lc):
    runs = [
        MLPRun("wine", hidden=16, lr=0.05, epochs=EPOCHS),
        MLPRun("wine", hidden=2, lr=0.0005, momentum=0.0, label_noise=0.6, epochs=EPOCHS),
    ]
    study = optuna.create_study(direction="maximize", pruner=OptunaPruner(EPOCHS, model=lc))
    for one in runs:
        trial = study.ask()
        for metrics in one:
            trial.report(metrics.accuracy, metrics.epoch - 1)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, metrics.accuracy)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.best_value > 0.9


def test_it_is_a_pruner_of_optuna_that_can_be_copied(lc):
    pruner = OptunaPruner(EPOCHS, model=lc, delta=0.1)
    assert isinstance(pruner, optuna.pruners.BasePruner) and isinstance(pruner, OptunaPruner)
    for twin in (copy.copy(pruner), pickle.loads(pickle.dumps(OptunaPruner(EPOCHS, delta=0.1)))):
        assert isinstance(twin, optuna.pruners.BasePruner) and twin.delta == 0.1

    class Mine(OptunaPruner):
        pass

    assert isinstance(Mine(EPOCHS), OptunaPruner) and type(Mine(EPOCHS)).__name__ == "Mine"


def test_bad_input(lc):
    with pytest.raises(DataError, match="delta: expected a probability"):
        OptunaPruner(EPOCHS, delta=0)
    with pytest.raises(DataError, match="expected first 0 or 1 and warmup >= 0, got 2 and 1"):
        OptunaPruner(EPOCHS, first=2)
    study = optuna.create_study(direction="minimize", pruner=OptunaPruner(5, model=lc))
    run_one = study.ask()
    run_one.report(0.5, 0)
    study.tell(run_one, 0.5)
    trial = study.ask()
    trial.report(0.5, 7)
    with pytest.raises(DataError, match="reported step 7, which is epoch 8 of horizon=5; report"):
        trial.should_prune()
    wrong = optuna.create_study(
        direction="minimize",
        pruner=OptunaPruner(5, model=lc, normalizer=CurveNormalizer.accuracy()),
    )
    wrong.enqueue_trial({})
    one = wrong.ask()
    one.report(0.5, 0)
    with pytest.raises(DataError, match="direction is minimize, the normalizer's is maximize"):
        one.should_prune()
