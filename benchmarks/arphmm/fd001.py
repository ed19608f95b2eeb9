"""Remaining useful life of turbofan engines: C-MAPSS FD001."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

_SENSORS = [s - 1 for s in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)]
_EDGES = (20.0, 45.0, 70.0, 95.0, 125.0)
_STATES = 6
_CAP = 130.0
_HELD_OUT = 30
_SPLITS = 10


def _data() -> Any:
    from probkit.datasets import load_cmapss

    root = os.environ.get("PROBKIT_DATA")
    folder = Path(root or "") / "arphmm"
    if root is None or not folder.is_dir():
        raise Unavailable("set PROBKIT_DATA to the folder that holds arphmm/train_FD001.txt.gz")
    return load_cmapss(folder)


def fit_and_calibrate(data: Any, seed: int) -> tuple[Any, Any]:
    """Fit on 70 training units, calibrate on the other 30; predict the test units.

    Returns:
        The predictive over the 100 test units before and after calibration.
    """
    import torch

    from probkit import infer
    from probkit.inference import EM
    from probkit.models import ARPHMM, Sequences, SwitchingPrior
    from probkit.models.arphmm import plausibility
    from probkit.models.arphmm.rul import ConformalLife, HealthIndicator, LifeRegression

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator).tolist()
    held, kept = order[:_HELD_OUT], order[_HELD_OUT:]
    indicator = HealthIndicator.fit([data.train[i][:, _SENSORS] for i in kept])

    def health(units: Sequence[Any]) -> Any:
        return Sequences([indicator(unit[:, _SENSORS]) for unit in units])

    lives = data.train_remaining
    edges = torch.tensor(_EDGES, dtype=torch.float64)
    labels = [
        plausibility.from_labels(
            _STATES - 1 - torch.bucketize(lives[i], edges), _STATES, nonspecificity=0.1
        )
        for i in kept
    ]
    train = health([data.train[i] for i in kept])
    model = ARPHMM(_STATES, 2, transition="left_right", prior=SwitchingPrior(scale=0.01))
    posterior = infer(model, Sequences(train.y, labels), EM(), rng=seed)
    regression = LifeRegression.fit(posterior, train, [lives[i] for i in kept], cap=_CAP)
    times = []
    for i in held:  # one time a unit, so that the calibration units are exchangeable
        steps = len(lives[i])
        earliest = max(30, steps - 150)
        times.append(int(torch.randint(earliest, steps - 5, (1,), generator=generator)))
    left = torch.stack([lives[i][t] for i, t in zip(held, times, strict=True)])
    calibration = regression.predict(health([data.train[i] for i in held]), times=times)
    conformal = ConformalLife.fit(calibration, left.clamp_max(_CAP))
    predicted = regression.predict(health(data.test))
    return predicted, conformal(predicted)


def _evaluate(quick: bool) -> list[Value]:
    import numpy as np

    from probkit.models.arphmm.rul import coverage_by_band, life_scores
    from probkit.models.arphmm.rul.metrics import crps

    data = _data()
    rows, tables = [], []
    for seed in range(2 if quick else _SPLITS):
        raw, calibrated = fit_and_calibrate(data, seed)
        table = coverage_by_band(calibrated, data.remaining)
        scores = life_scores(calibrated.mean, data.remaining)
        capped = life_scores(raw.mean, data.remaining.clamp_max(125.0))
        before = coverage_by_band(raw, data.remaining)
        rows.append(
            {
                "RMSE, raw life, cycles": scores["rmse"],
                "RMSE before calibration": life_scores(raw.mean, data.remaining)["rmse"],
                "RMSE, life capped at 125": capped["rmse"],
                "MAE, cycles": scores["mae"],
                "PHM08 score": scores["phm08"],
                "accuracy, %": scores["accuracy"],
                "late, %": scores["late"],
                "CRPS, cycles": float(crps(calibrated, data.remaining).mean()),
                "coverage of 90 % intervals": float(table.loc["all", "covered"]),
                "coverage before calibration": float(before.loc["all", "covered"]),
                "width of 90 % intervals, cycles": float(table.loc["all", "width"]),
            }
        )
        tables.append(table["covered"])
    note = f"mean over {len(rows)} random splits, 70 units to fit and 30 to calibrate"
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    spread = {name: float(np.std([row[name] for row in rows], ddof=1)) for name in rows[0]}
    limits = {
        "RMSE, raw life, cycles": {"reference": 19.5, "rule": "at most"},
        "coverage of 90 % intervals": {"reference": 0.90, "tolerance": 0.03},
    }
    values = [
        Value(name, value, note=f"{note}; sd {spread[name]:.3g}", **limits.get(name, {}))  # type: ignore[arg-type]
        for name, value in mean.items()
    ]
    for band in tables[0].index[:-1]:
        share = float(np.mean([table[band] for table in tables]))
        values.append(Value(f"coverage, life in {band}", share, note=note))
    values += _baselines(data)
    return values


def _baselines(data: Any) -> list[Value]:
    """The training mean, and one regression of life on the sensors without states."""
    import torch

    from probkit.models.arphmm.rul import HealthIndicator, life_scores

    lives = torch.cat(list(data.train_remaining)).clamp_max(125.0)
    constant = life_scores(lives.mean().expand(len(data.test)), data.remaining)
    indicator = HealthIndicator.fit([unit[:, _SENSORS] for unit in data.train])
    last = [125.0 * indicator(unit[:, _SENSORS])[-10:].mean() for unit in data.test]
    linear = life_scores(torch.stack(last), data.remaining)
    return [
        Value("RMSE of the training mean", constant["rmse"]),
        Value("RMSE of the health indicator alone (mean of the last 10)", linear["rmse"]),
    ]


BENCHMARK = Quality(
    title="Remaining useful life, C-MAPSS FD001",
    question=(
        "How well does a left-to-right ARPHMM with soft labels and state-wise regressions predict "
        "the remaining life of 100 test engines, and do its intervals cover?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
