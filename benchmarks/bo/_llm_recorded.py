"""Tasks of recorded runs of a language model, their objectives computed anew.

The scores reproduce with the present scikit-learn, but for AdaBoost: it was scikit-learn's default
of its time (SAMME.R, which boosts class probabilities and has left scikit-learn since), written
here after Zhu, Zou, Rosset and Hastie, "Multi-class AdaBoost", 2009, algorithm 4.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bo._llm_cells import Plan
from benchmarks.harness.spec import Unavailable

__all__ = ["DATASETS", "MODELS", "STARTS", "TRIALS", "Recorded", "folder", "recorded", "run"]

DATASETS = ("breast", "iris", "wine")
#: The cheapest objectives first.
MODELS = ("DecisionTree", "SVM", "RandomForest", "MLP_SGD", "AdaBoost")
STARTS, TRIALS = 5, 30
_WHOLE = ("max_depth", "n_estimators", "hidden_layer_sizes", "batch_size")


class Recorded(NamedTuple):
    """One recorded run.

    Attributes:
        params: What was evaluated, in order.
        scores: What came of it; larger is better but for griewank and ktablet.
    """

    params: list[dict[str, Any]]
    scores: list[float]


def folder() -> Path:
    """Return the folder of the recorded runs.

    Raises:
        Unavailable: There is none.
    """
    root = os.environ.get("PROBKIT_DATA")
    if not root:
        raise Unavailable("the recorded runs are read from PROBKIT_DATA, which is not set")
    found = Path(root) / "llm_bo" / "llambo_bayesmark"
    if not (found / "histories.csv").exists():
        raise Unavailable("PROBKIT_DATA holds no llm_bo/llambo_bayesmark/histories.csv")
    return found


@functools.cache
def recorded() -> dict[tuple[str, str, int], Recorded]:
    """Return all runs by (data set, model, seed)."""
    import pandas as pd

    table = pd.read_csv(folder() / "histories.csv").sort_values("trial")
    return {
        key: Recorded([_plain(json.loads(c)) for c in rows.config], rows.score.tolist())
        for key, rows in table.groupby(["dataset", "model", "seed"])
    }


def _plain(config: Mapping[str, float]) -> dict[str, Any]:
    return {name: int(v) if name in _WHOLE else float(v) for name, v in config.items()}


def space_of(model: str) -> Any:
    """Return the search space of a model; as in the recorded runs only "log" warps."""
    from probkit.bo import Float, Int, Space

    rows = json.loads((folder() / "search_spaces.json").read_text(encoding="utf-8"))[model]
    made: dict[str, Any] = {}
    for name, (kind, transform, (low, high)) in rows.items():
        made[name] = (
            Int(low, high) if kind == "int" else Float(low, high, log=transform == "log")
        )  # fmt: skip
    return Space(made)


@functools.cache
def _data(dataset: str) -> tuple[Any, Any]:
    import numpy as np

    arrays = np.load(folder() / f"{dataset}.npz")
    return arrays["train_x"], arrays["train_y"]


def score(dataset: str, model: str, params: Mapping[str, Any]) -> float:
    """Return the accuracy in 5-fold cross-validation."""
    from sklearn.model_selection import cross_val_score

    X, y = _data(dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cross_val_score(_estimator(model, params), X, y, cv=5, scoring="accuracy")
    return float(found.mean())


def _estimator(model: str, params: Mapping[str, Any]) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC
    from sklearn.tree import DecisionTreeClassifier

    if model == "RandomForest":
        return RandomForestClassifier(n_estimators=10, random_state=0, **params)
    if model == "DecisionTree":
        return DecisionTreeClassifier(random_state=0, **params)
    if model == "SVM":
        return SVC(kernel="rbf", random_state=0, **params)
    if model == "MLP_SGD":
        return MLPClassifier(
            solver="sgd", early_stopping=True, max_iter=40, learning_rate="invscaling",
            random_state=0, **params,
        )  # fmt: skip
    return _boosting()(random_state=0, **params)


@functools.cache
def _boosting() -> Any:
    import numpy as np
    from scipy.special import xlogy
    from sklearn.ensemble import AdaBoostClassifier

    class RealBoosting(AdaBoostClassifier):  # type: ignore[misc]
        """Boosting by class probabilities."""

        def _boost(self, iboost: int, X: Any, y: Any, sample_weight: Any, random_state: Any) -> Any:
            stump = self._make_estimator(random_state=random_state)
            stump.fit(X, y, sample_weight=sample_weight)
            if iboost == 0:
                self.classes_, self.n_classes_ = stump.classes_, len(stump.classes_)
            shares = stump.predict_proba(X)
            wrong = self.classes_.take(np.argmax(shares, axis=1)) != y
            error = np.average(wrong, weights=sample_weight)
            if error <= 0:
                return sample_weight, 1.0, 0.0
            np.clip(shares, np.finfo(shares.dtype).eps, None, out=shares)
            others = -1.0 / (self.n_classes_ - 1)
            codes = np.where(self.classes_[None] == y[:, None], 1.0, others)
            rate = self.learning_rate * (self.n_classes_ - 1) / self.n_classes_
            change = -rate * xlogy(codes, shares).sum(1)
            if iboost < self.n_estimators - 1:
                grows = (sample_weight > 0) | (change < 0)
                sample_weight = np.exp(np.log(sample_weight) + change * grows)
            return sample_weight, 1.0, error

        def predict(self, X: Any) -> Any:
            total: Any = 0.0
            for stump in self.estimators_:
                logs = np.log(np.clip(stump.predict_proba(X), np.finfo(float).eps, None))
                total = total + logs - logs.mean(1, keepdims=True)
            return self.classes_.take(np.argmax(total, axis=1))

    return RealBoosting


class _Problem(NamedTuple):
    """What the methods of the other benchmarks expect of a problem."""

    space: Any
    objectives: dict[str, str]


def run(plan: Plan) -> dict[str, Any]:
    """Run a method from the five points that a recorded run began with."""
    from benchmarks.bo._methods import _Optuna, _Random, _Study
    from probkit.bo import Study

    _, dataset, model, method, seed = plan
    space = space_of(model)
    problem: Any = _Problem(space, {"accuracy": "max"})
    start = recorded()[dataset, model, seed]
    chooser: Any
    if method == "random":
        chooser = _Random(problem, seed)
    elif method == "tpe":
        chooser = _Optuna(problem, "tpe", seed)
        import optuna

        chooser.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTS)
    else:
        surrogate, _, exact = method.partition(" ")
        chooser = _Study.__new__(_Study)
        chooser.study = Study(
            space, problem.objectives, surrogate=surrogate, noise="none" if exact else "auto",
            rng=seed, initial=STARTS,
        )  # fmt: skip
    scores, asks, evaluations = [], [], []
    for params in start.params[:STARTS]:
        scores.append(score(dataset, model, params))
        chooser.attach(_inside(space, params), {"accuracy": scores[-1]})
    for _ in range(TRIALS - STARTS):
        begin = time.process_time()
        params = dict(chooser.ask())
        middle = time.process_time()
        value = score(dataset, model, params)
        evaluations.append(time.process_time() - middle)
        asks.append(middle - begin)
        scores.append(value)
        chooser.tell({"accuracy": value})
    difference = max(
        abs(a - b) for a, b in zip(scores[:STARTS], start.scores[:STARTS], strict=True)
    )
    return {
        "scores": scores,
        "ask_cpu_s": asks,
        "evaluation_cpu_s": evaluations,
        "largest_difference_of_starts": difference,
    }


def _inside(space: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Move values that rounding of the file has put outside the bounds by less than 1e-9."""
    found = {}
    for name, value in params.items():
        low, high = space.parameters[name].low, space.parameters[name].high
        near = min(max(value, low), high)
        found[name] = near if math.isclose(near, value, rel_tol=1e-9) else value
    return found
