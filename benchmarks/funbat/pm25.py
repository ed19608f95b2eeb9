"""Beijing PM2.5: errors and coverage beside the plain alternatives."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks.funbat import _peers
from benchmarks.funbat._pm25 import MODES, candidates, each, fit, read, score
from benchmarks.harness.spec import Quality, Value

_SEEDS = 5


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _split(fold: int) -> _peers.Split:
    index, y, masks = read()
    test = masks[fold]
    return index[~test], y[~test], index[test], y[test]


def _median(scores: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in scores)


def _chosen(split: _peers.Split, seeds: int) -> tuple[str, Any]:
    """Choose by one inner split of the training entries; fit ``seeds`` times."""
    from probkit.inference.passing import MessagePassing
    from probkit.models.funbat import TensorData
    from probkit.models.funbat.selection import choose_structure

    x, y, _, _ = split
    choice = choose_structure(
        TensorData(x, y, MODES),
        candidates(),
        rng=0,
        sampler=MessagePassing(sweeps=25),
        seeds=1,
        refit=False,
    )
    _say(f"inner validation:\n{choice.scores.round(4).to_string()}")
    return choice.name, fit(choice.model, x, y, rng=1, seeds=seeds, sweeps=30)


def _evaluate(quick: bool) -> list[Value]:
    first = _split(0)
    x, y, x_test, y_test = first
    values = []
    rows = _peers.point_rows(first)
    rows |= _peers.tensorly_rows(first)
    values += [Value(f"RMSE, {name}", number) for name, number in rows.items()]
    svgp = _peers.svgp_scores(first, steps=20 if quick else 400)
    values += [
        Value(f"{text}, GPyTorch SVGP, 200 inducing inputs", svgp[key])
        for key, text in (("rmse", "RMSE"), ("nlpd", "NLPD"), ("coverage", "90 % coverage"))
    ]
    _say(f"{rows} {svgp}")

    model = candidates()["CP 3"]
    fits = [score(one, x_test, y_test) for one in each(fit(model, x, y, rng=0, seeds=_SEEDS))]
    _say(f"CP 3: {fits}")
    values += [
        Value(
            "RMSE, CP of rank 3, kernels per mode, median of 5 seeds",
            _median(fits, "rmse"),
            0.295,
            rule="at most",
        ),
        Value("90 % coverage, CP of rank 3, median of 5 seeds", _median(fits, "coverage")),
    ]

    name, post = _chosen(first, _SEEDS)
    averaged = score(post, x_test, y_test)
    fits = [score(one, x_test, y_test) for one in each(post)]
    _say(f"{name}: {fits}, averaged {averaged}")
    note = f"chosen by inner validation: {name}"
    values += [
        Value(
            "RMSE, chosen model, median of 5 seeds",
            _median(fits, "rmse"),
            0.285,
            0,
            "at most",
            note,
        ),
        Value("RMSE, chosen model, 5 seeds averaged", averaged["rmse"], 0.265, 0, "at most", note),
        Value("MAE, chosen model, 5 seeds averaged", averaged["mae"]),
        Value("NLPD, chosen model, median of 5 seeds", _median(fits, "nlpd"), 0.15, 0, "at most"),
        Value("NLPD, chosen model, 5 seeds averaged", averaged["nlpd"], -0.3, 0, "at most"),
        Value(
            "90 % coverage, chosen model, median of 5 seeds", _median(fits, "coverage"), 0.9, 0.02
        ),
        Value("90 % coverage, chosen model, 5 seeds averaged", averaged["coverage"], 0.9, 0.02),
    ]
    if quick:
        return values
    folds = [averaged]
    for fold in range(1, 5):
        split = _split(fold)
        name, post = _chosen(split, 2)
        scores = score(post, *split[2:])
        _say(f"fold {fold}, {name}: {scores}")
        folds.append(scores)
    for key, text in (
        ("rmse", "RMSE"),
        ("mae", "MAE"),
        ("nlpd", "NLPD"),
        ("coverage", "90 % coverage"),
    ):
        mean = statistics.fmean(one[key] for one in folds)
        values.append(Value(f"{text}, chosen model, seeds averaged, mean of 5 folds", mean))
    return values


BENCHMARK = Quality(
    title="Beijing PM2.5",
    question=(
        "What errors and coverage does message passing reach on daily PM2.5 of twelve stations, "
        "indexed by temperature, pressure and day (13,572 entries to learn from, fold 0), the "
        "model chosen by inner validation on those, beside the mean of the day, gradient boosting, "
        "nearest neighbours, masked tensor completion and a sparse GP?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "gpytorch", "tensorly", "scikit-learn"),
    timeout=3600.0,
)
