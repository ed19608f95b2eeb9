"""Test log density and error on small UCI-style sets, beside reference figures.

The sets are read from ``PROBKIT_DATA/nngp`` (whitespace-separated text, last column the target).
Splits are the common 90/10 ones, drawn one after another from NumPy's legacy generator with
seed 1. Everything is standardised with training statistics; the log density is on the scale of y.

The reference figures are means over the same splits of an independent implementation: ReLU, two
hidden layers, hyper-parameters by LBFGS on the marginal likelihood, quadrature for Burr(2, 1).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.spec import Quality, Unavailable, Value


class _Split(NamedTuple):
    x: Any  # [train, d], standardised
    y: Any  # [train], standardised
    x_test: Any  # [test, d]
    y_test: Any  # [test], standardised
    y_std: float


class _Score(NamedTuple):
    nll: float
    rmse: float


_SPLITS = {"yacht": 5, "energy": 3, "boston": 3}
_LAWS = ("NNGP", "inverse gamma", "Burr")
_NLL = {
    "yacht": (0.312, 0.310, 0.316),
    "energy": (0.855, 0.853, 0.854),
    "boston": (2.377, 2.373, 2.373),
}
_RMSE_NNGP = {"yacht": 0.487, "energy": 0.559, "boston": 2.544}
_LEARNED = ("kernel.w_std", "kernel.b_std", "noise_var")
_NLL_TOLERANCE, _RMSE_TOLERANCE = 0.02, 0.05


def _file(name: str) -> Path:
    """Return the path of a data set.

    Raises:
        Unavailable: ``PROBKIT_DATA`` is not set, or holds no such file.
    """
    root = os.environ.get("PROBKIT_DATA")
    if not root:
        raise Unavailable("PROBKIT_DATA does not name the folder that holds nngp/yacht.txt")
    path = Path(root) / "nngp" / f"{name}.txt"
    if not path.exists():
        raise Unavailable(f"PROBKIT_DATA holds no nngp/{name}.txt")
    return path


def _splits(name: str, count: int) -> Iterator[_Split]:
    import numpy as np
    import torch

    table = np.loadtxt(_file(name))
    legacy = np.random.RandomState(1)
    for _ in range(count):
        order = legacy.choice(range(len(table)), len(table), replace=False)
        cut = round(0.9 * len(table))
        train, test = table[order[:cut]], table[order[cut:]]
        mean, std = train.mean(0), train.std(0)
        std = np.where(std > 0, std, 1.0)
        a, b = (torch.as_tensor((part - mean) / std) for part in (train, test))
        yield _Split(a[:, :-1], a[:, -1], b[:, :-1], b[:, -1], float(std[-1]))


def _law(name: str) -> Any:
    from probkit.models import BurrXII, InverseGamma, PointMass

    laws = {
        "NNGP": lambda: PointMass(1.0),
        "inverse gamma": lambda: InverseGamma(2.0, 2.0),
        "Burr": lambda: BurrXII(2.0, 1.0),
    }
    return laws[name]()


def _score(split: _Split, law: str) -> _Score:
    """Fit one model on a split and score it on the test rows."""
    from probkit import infer
    from probkit.inference import MAP, Direct
    from probkit.kernels import NNGPKernel
    from probkit.models import ScaleMixtureNNGP

    # The last layer's scale is fixed at 1: w_std is a scale too with ReLU, and so is the law's.
    kernel = NNGPKernel(depth=2, activation="relu", w_std=1.0, b_std=0.1, last_w_std=1.0)
    model = ScaleMixtureNNGP(kernel.double(), scale=_law(law), noise_var=0.1, learn=_LEARNED)
    posterior = infer(model, (split.x, split.y), Direct(hyper=MAP()), rng=0)
    predictive = posterior.predict(split.x_test)
    nll = -float(predictive.log_prob(split.y_test).mean()) + math.log(split.y_std)
    error = float((predictive.mean - split.y_test).square().mean().sqrt()) * split.y_std
    return _Score(nll, error)


def _evaluate(quick: bool) -> list[Value]:
    sets = {"yacht": 1} if quick else _SPLITS
    values = []
    for name, count in sets.items():
        splits = list(_splits(name, count))
        for column, law in enumerate(_LAWS):
            scores = [_score(split, law) for split in splits]
            print(f"  {name}, {law}: {scores}", file=sys.stderr)
            nll = sum(score.nll for score in scores) / count
            rmse = sum(score.rmse for score in scores) / count
            held = count == _SPLITS[name]  # a mean over fewer splits has no reference
            values.append(
                Value(
                    f"{name}, {law}, test NLL",
                    nll,
                    reference=_NLL[name][column] if held else None,
                    tolerance=_NLL_TOLERANCE,
                    note=f"mean over splits 0-{count - 1}",
                )
            )
            known = held and law == "NNGP"
            values.append(
                Value(
                    f"{name}, {law}, RMSE",
                    rmse,
                    reference=_RMSE_NNGP[name] if known else None,
                    tolerance=_RMSE_TOLERANCE * _RMSE_NNGP[name],
                    note=f"mean over splits 0-{count - 1}",
                )
            )
    return values


BENCHMARK = Quality(
    title="UCI regression, scale mixtures of NNGPs",
    question=(
        "Do the fitted models (ReLU, two hidden layers, marginal likelihood) reach the test "
        "NLL (within 0.02) and RMSE (within 5 %) of an independent implementation?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "gpytorch", "scikit-learn"),
)
