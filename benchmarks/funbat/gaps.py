"""Whole days withheld: are predictions in gaps as uncertain as they should be?"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.funbat import _peers
from benchmarks.funbat._pm25 import DAYS, MODES, candidates, fit, read, score
from benchmarks.harness.spec import Quality, Value

_LENGTH, _GAPS = 5, 44


def _split() -> _peers.Split:
    """Withhold 44 gaps of five days, no two of them within five days of each other."""
    import numpy as np

    index, y, _ = read()
    rng = np.random.default_rng(0)
    starts = rng.choice(np.arange(1, DAYS // (2 * _LENGTH) - 1), _GAPS, replace=False) * 2 * _LENGTH
    withheld = (starts[:, None] + np.arange(_LENGTH)).ravel()
    test = np.isin(np.rint(index[:, 2] * (DAYS - 1)).astype(int), withheld)
    return index[~test], y[~test], index[test], y[test]


def _models() -> dict[str, Any]:
    """Structures with and without learned hyper-parameters."""
    own = candidates()
    return {name: own[name] for name in ("CP 3", "pairs", "pairs, log, Student-t")}


def _evaluate(quick: bool) -> list[Value]:
    from probkit.inference.passing import MessagePassing
    from probkit.models.funbat import TensorData
    from probkit.models.funbat.selection import choose_structure

    x, y, x_test, y_test = _split()
    line = _peers.rmse(_peers.interpolated_day_means(x, y, x_test), y_test)
    values = [Value("RMSE, day means interpolated", line)]
    found = {}
    for name, model in _models().items():
        found[name] = score(
            fit(model, x, y, rng=0, seeds=1 if quick else 2, sweeps=30), x_test, y_test
        )
        print(f"  {name}: {found[name]}", file=sys.stderr, flush=True)
        values += [
            Value(f"RMSE, {name}", found[name]["rmse"]),
            Value(f"90 % coverage, {name}", found[name]["coverage"]),
        ]
    choice = choose_structure(
        TensorData(x, y, MODES),
        _models(),
        rng=0,
        sampler=MessagePassing(sweeps=25),
        seeds=1,
        withhold="day",
        block=_LENGTH / DAYS,
        refit=False,
    )
    print(choice.scores.round(4).to_string(), file=sys.stderr, flush=True)
    note = f"chosen on gaps of five training days: {choice.name}"
    best = found[choice.name]
    values += [
        Value("RMSE, chosen model", best["rmse"], line, 0.0, "at most", note),
        Value("90 % coverage, chosen model", best["coverage"], 0.92, 0.08, "near", note),
        Value("NLPD, chosen model", best["nlpd"]),
    ]
    return values


BENCHMARK = Quality(
    title="Gaps in Beijing PM2.5",
    question=(
        "In 44 withheld gaps of five days, do 90 % intervals cover at least 84 % of the entries, "
        "and is the error no larger than that of interpolated day means?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
    timeout=3600.0,
)
