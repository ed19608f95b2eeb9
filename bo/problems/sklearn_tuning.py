"""Tuning models of scikit-learn on data that it brings along."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from probkit.bo.outcomes import Outcomes
from probkit.bo.parameters import Categorical, Float, Int
from probkit.bo.problems.base import Problem
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["SklearnTuning"]

_DATA = {
    "digits": "classify",
    "breast_cancer": "classify",
    "wine": "classify",
    "iris": "classify",
    "diabetes": "regress",
}
_SEED = 0


class SklearnTuning(Problem):
    """Hyper-parameters of a model, judged by cross-validation; minimise the loss.

    The loss is the share of errors, or the mean squared error over the variance of the targets.
    Folds and random states are fixed, so that a point has one value. Features are standardised.

    Args:
        model: "svm", "forest", "boosting", "network" or "neighbours".
        data: "digits", "breast_cancer", "wine", "iris" or "diabetes".
        folds: Number of folds.
        rows: Most rows used, the same ones every time; None for all.

    Example:
        >>> problem = SklearnTuning("svm", "iris")
        >>> problem({"C": 1.0, "gamma": 0.1, "kernel": "rbf"})["loss"] < 0.1
        True
    """

    def __init__(
        self, model: str = "svm", data: str = "digits", *, folds: int = 3, rows: int | None = None
    ) -> None:
        if model not in _MODELS:
            names = ", ".join(map(repr, _MODELS))
            raise DataError(f"model: expected one of {names}, got {model!r}")
        if data not in _DATA:
            names = ", ".join(map(repr, _DATA))
            raise DataError(f"data: expected one of {names}, got {data!r}")
        if folds < 2:
            raise DataError(f"folds: expected at least 2, got {folds!r}")
        self.model, self.data, self.folds = model, data, folds
        self.task = _DATA[data]
        space, self._make = _MODELS[model]
        self.space = space()
        self.outcomes = Outcomes({"loss": "min"})
        self._X, self._y = _load(data, rows)

    @property
    def name(self) -> str:
        """Model and data."""
        return f"{self.model} on {self.data}"

    def evaluate(self, params: Params) -> dict[str, float]:
        """Cross-validate."""
        from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        classify = self.task == "classify"
        kind = StratifiedKFold if classify else KFold
        folds = kind(self.folds, shuffle=True, random_state=_SEED)
        pipeline = make_pipeline(StandardScaler(), self._make(dict(params), classify))
        scoring = "accuracy" if classify else "neg_mean_squared_error"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Bad settings need not converge: they lose.
            scores = cross_val_score(pipeline, self._X, self._y, cv=folds, scoring=scoring)
        loss = 1.0 - scores.mean() if classify else -scores.mean() / float(np.var(self._y))
        return {"loss": float(loss)}


def _load(data: str, rows: int | None) -> tuple[Any, Any]:
    from sklearn import datasets

    X, y = getattr(datasets, f"load_{data}")(return_X_y=True)
    if rows is None or rows >= len(X):
        return X, y
    chosen = np.sort(np.random.RandomState(_SEED).permutation(len(X))[:rows])
    return X[chosen], y[chosen]


def _svm_space() -> Space:
    return Space(
        C=Float(1e-3, 1e3, log=True),
        kernel=Categorical(["rbf", "linear"]),
        gamma=Float(1e-5, 1e1, log=True, when={"kernel": "rbf"}),
    )


def _svm(params: Mapping[str, Any], classify: bool) -> Any:
    from sklearn.svm import SVC, SVR

    # Without a random state SVC would draw from the global stream of NumPy.
    return SVC(**params, random_state=_SEED) if classify else SVR(**params)


def _forest_space() -> Space:
    return Space(
        n_estimators=Int(5, 100, log=True),
        max_depth=Int(1, 20),
        min_samples_leaf=Int(1, 20, log=True),
        max_features=Float(0.05, 1.0),
    )


def _forest(params: Mapping[str, Any], classify: bool) -> Any:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    kind = RandomForestClassifier if classify else RandomForestRegressor
    return kind(**params, random_state=_SEED, n_jobs=1)


def _boosting_space() -> Space:
    return Space(
        learning_rate=Float(1e-3, 1.0, log=True),
        max_iter=Int(10, 100, log=True),
        max_leaf_nodes=Int(2, 64, log=True),
        l2_regularization=Float(1e-6, 1e2, log=True),
    )


def _boosting(params: Mapping[str, Any], classify: bool) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
    return kind(**params, random_state=_SEED, early_stopping=False)


def _network_space() -> Space:
    return Space(
        width=Int(4, 128, log=True),
        layers=Int(1, 3),
        activation=Categorical(["relu", "tanh"]),
        alpha=Float(1e-6, 1e1, log=True),
        learning_rate_init=Float(1e-4, 1e-1, log=True),
    )


def _network(params: Mapping[str, Any], classify: bool) -> Any:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    rest = {k: v for k, v in params.items() if k not in ("width", "layers")}
    sizes = (params["width"],) * params["layers"]
    kind = MLPClassifier if classify else MLPRegressor
    return kind(hidden_layer_sizes=sizes, max_iter=60, random_state=_SEED, **rest)


def _neighbours_space() -> Space:
    return Space(
        n_neighbors=Int(1, 30, log=True),
        weights=Categorical(["uniform", "distance"]),
        p=Float(1.0, 4.0),
    )


def _neighbours(params: Mapping[str, Any], classify: bool) -> Any:
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    return (KNeighborsClassifier if classify else KNeighborsRegressor)(**params)


_MODELS: Mapping[str, tuple[Callable[[], Space], Callable[[Mapping[str, Any], bool], Any]]] = {
    "svm": (_svm_space, _svm),
    "forest": (_forest_space, _forest),
    "boosting": (_boosting_space, _boosting),
    "network": (_network_space, _network),
    "neighbours": (_neighbours_space, _neighbours),
}
