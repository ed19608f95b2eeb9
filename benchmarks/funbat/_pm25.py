"""The Beijing PM2.5 set: entries, splits, models and scores that several benchmarks share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Unavailable

MODES = ("temperature", "pressure", "day")
DAYS = 1461
BINS = (427, 500, 1460)


def read() -> tuple[Any, Any, Any]:
    """Return coordinates [entry, mode] in [0, 1], y [entry] and test masks [fold, entry].

    Raises:
        Unavailable: ``PROBKIT_DATA`` is not set, or holds no such file.
    """
    import numpy as np

    root = os.environ.get("PROBKIT_DATA")
    if not root:
        raise Unavailable("set PROBKIT_DATA to the folder that holds funbat/beijing_pm25.npz")
    path = Path(root) / "funbat" / "beijing_pm25.npz"
    if not path.exists():
        raise Unavailable("PROBKIT_DATA holds no file funbat/beijing_pm25.npz")
    stored = np.load(path)
    return stored["index"] / (stored["ndims"] - 1), stored["y"], stored["test_mask"]


def kernels(rough: bool = False) -> list[Any]:
    """Return one kernel for each mode: smooth along the weather, rough along the days."""
    from probkit.kernels.state_space import Matern

    nu = 0.5 if rough else 1.5
    return [Matern(nu, 0.3), Matern(nu, 0.3), Matern(0.5, 0.01)]


def candidates() -> dict[str, Any]:
    """Return the structures that inner validation chooses from."""
    from probkit.models.funbat import FunBaT, LogWarp, StudentTNoise, additive

    fixed = {"learn_hyperparameters": False}
    pairs = additive(3)
    heavy = {"noise": StudentTNoise(), "kernels": kernels()}
    return {
        "CP 3, rough": FunBaT(3, kind="cp", kernels=kernels(rough=True), **fixed),
        "CP 3": FunBaT(3, kind="cp", kernels=kernels(), **fixed),
        "pairs": FunBaT(kind="cp", masks=pairs, kernels=kernels()),
        "pairs, log, Student-t": FunBaT(kind="cp", masks=pairs, warp=LogWarp(), **heavy),
        "pairs, log near zero, Student-t": FunBaT(
            kind="cp", masks=pairs, warp=LogWarp(margin=0.1), **heavy
        ),
    }


def fit(model: Any, index: Any, y: Any, *, rng: int, seeds: int = 1, sweeps: int = 40) -> Any:
    """Fit by message passing, ``seeds`` fits to average."""
    import warnings

    import probkit as pk
    from probkit.inference.passing import MessagePassing
    from probkit.models.funbat import TensorData

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.ConvergenceWarning)
        return pk.infer(
            model,
            TensorData(index, y, MODES),
            MessagePassing(sweeps=sweeps),
            rng=rng,
            chains=seeds,
        )


def score(post: Any, index: Any, y: Any) -> dict[str, float]:
    """RMSE and MAE of medians, NLPD and 90 % coverage on test entries."""
    import torch

    from probkit.models.funbat.selection import score_predictions

    return score_predictions(post.predict(index), torch.as_tensor(y))


def each(post: Any) -> list[Any]:
    """Return a posterior of each of the fits that ``post`` averages."""
    from dataclasses import replace

    return [
        replace(post, source=replace(post.source, params=[params])) for params in post.source.params
    ]


def day_means(index: Any, y: Any) -> tuple[Any, Any]:
    """Return the days that were seen [day] and the mean of y on each."""
    import numpy as np

    days = np.rint(index[:, 2] * (DAYS - 1)).astype(int)
    seen, place = np.unique(days, return_inverse=True)
    return seen, np.bincount(place, y) / np.bincount(place)
