"""What stopping hopeless runs saves, and what it costs, on 180 real training runs.

The runs of a data set come one after another, in 40 random orders, 100 epochs each unless stopped.
The value to beat is the best seen so far. The rule on learning curves judges after every epoch;
patience leaves a run whose own best is k epochs old; median pruning is Optuna's, among runs that
ran to their end, after five of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

_ORDERS, _DELTA, _ASKED = 40, 0.05, 25
_BUDGET = 20  # full runs

# A policy says after how many epochs it leaves a run, given what it saw of the earlier ones.
Policy = Callable[[Any, Any, list[tuple[Any, int]]], int]


def _reach(lc: Any, curves: Any) -> Any:
    """[run, epoch] the largest 0.95 quantile of any later epoch, on the scale of the network.

    The rule stops a run after T exactly where the value to beat is above this.
    """
    import torch

    n, horizon = curves.y.shape
    y = curves.normalized
    t = curves.t
    best = torch.full((n, horizon), float("inf"), dtype=torch.float64)
    for cut in range(2, horizon):
        later = torch.linspace(cut + 1, horizon, min(_ASKED, horizon - cut)).round().double()
        seen = type(curves)(t[:, :cut], y[:, :cut], allow_outside=True)
        law = lc.law(seen, later.expand(n, -1))
        best[:, cut - 1] = law.icdf(torch.full(law.batch_shape, 1 - _DELTA)).amax(1).double()
    return best


def _no_stop(y: Any, best: Any, past: list[tuple[Any, int]]) -> int:
    return len(y)


def _patience(k: int) -> Policy:
    def policy(y: Any, best: Any, past: list[tuple[Any, int]]) -> int:
        top, at = y[0], 0
        for epoch in range(1, len(y)):
            if y[epoch] > top:
                top, at = y[epoch], epoch
            elif epoch - at >= k:
                return epoch + 1
        return len(y)

    return policy


def _median(y: Any, best: Any, past: list[tuple[Any, int]]) -> int:
    import numpy as np

    full = [other for other, used in past if used == len(other)]
    if len(full) < 5:
        return len(y)
    middle = np.median(np.stack(full), 0)
    below = np.maximum.accumulate(y) < middle
    below[:5] = False
    return int(below.argmax()) + 1 if below.any() else len(y)


def _curve_rule(reach: Mapping[int, Any]) -> Policy:
    import numpy as np

    def policy(y: Any, best: Any, past: list[tuple[Any, int]]) -> int:
        if best is None:
            return len(y)
        to_beat = np.maximum(np.maximum.accumulate(y), best)
        left = to_beat >= reach[id(y)]
        return int(left.argmax()) + 1 if left.any() else len(y)

    return policy


def _play(policy: Policy, runs: list[Any], order: Any) -> tuple[int, float, float]:
    """Epochs used, the best value found, and the best within the budget."""
    best: float | None = None
    used, past = 0, []
    in_budget = 0.0
    limit = _BUDGET * len(runs[0])
    for index in order:
        y = runs[index]
        epochs = policy(y, best, past)
        seen = y[: min(epochs, max(0, limit - used))]
        if len(seen):
            in_budget = max(in_budget, float(seen.max()))
        used += epochs
        best = float(y[:epochs].max()) if best is None else max(best, float(y[:epochs].max()))
        past.append((y, epochs))
    assert best is not None
    return used, best, in_budget


def _evaluate(quick: bool) -> list[Value]:
    if "PROBKIT_DATA" not in os.environ:
        raise Unavailable("PROBKIT_DATA is not set: the training runs are read from its pfn folder")
    import numpy as np
    import torch

    from probkit.datasets import load_mlp_curves
    from probkit.models.pfn import CurveNormalizer, Curves, LearningCurvePFN

    lc = LearningCurvePFN.load(out_of_prior="ignore")
    values: list[Value] = []
    for metric in ("accuracy",) if quick else ("accuracy", "log loss"):
        data = load_mlp_curves(Path(os.environ["PROBKIT_DATA"]) / "pfn", metric=metric)
        if metric == "accuracy":
            normalizer = CurveNormalizer.accuracy()
        else:
            assert data.y0 is not None
            # the untrained loss of each data set, so that its runs share one scale
            typical = {
                name: float(data.y0[torch.tensor((data.runs["dataset"] == name).tolist())].median())
                for name in data.runs["dataset"].unique()
            }
            normalizer = CurveNormalizer.log_loss([typical[n] for n in data.runs["dataset"]])
        curves = Curves(None, list(data.y), normalizer)
        scaled, reach = curves.normalized.numpy(), _reach(lc, curves).numpy()
        rng = np.random.default_rng(0)
        found: dict[str, list[tuple[float, float, float]]] = {}
        for name in sorted(data.runs["dataset"].unique()):
            rows = np.flatnonzero(data.runs["dataset"] == name)
            runs = [scaled[i] for i in rows]
            policies: dict[str, Policy] = {
                "no stopping": _no_stop,
                **{f"patience {k}": _patience(k) for k in (1, 5, 10, 20, 50)},
                "median pruning": _median,
                "learning curves": _curve_rule(
                    {id(run): reach[i] for run, i in zip(runs, rows, strict=True)}
                ),
            }
            top = max(float(run.max()) for run in runs)
            full = sum(len(run) for run in runs)
            orders = [rng.permutation(len(runs)) for _ in range(5 if quick else _ORDERS)]
            for label, policy in policies.items():
                for order in orders:
                    used, best, in_budget = _play(policy, runs, order)
                    found.setdefault(label, []).append(
                        (1 - used / full, top - best, top - in_budget)
                    )
        for label, rows_found in found.items():
            saved, regret, early = np.asarray(rows_found).mean(0)
            error = np.asarray(rows_found)[:, 1].std(ddof=1) / len(rows_found) ** 0.5
            print(f"  {metric}, {label}: {saved:.3f} {regret:.4f} {early:.4f}", file=sys.stderr)
            values += [
                Value(f"{metric}: {label}, share of epochs saved", float(saved)),
                Value(
                    f"{metric}: {label}, regret",
                    float(regret),
                    note=f"on the scale 0 to 1 of the network; standard error {error:.2g}",
                ),
                Value(f"{metric}: {label}, regret after {_BUDGET} full runs' epochs", float(early)),
            ]
    return values


BENCHMARK = Quality(
    title="Stopping hopeless training runs",
    question=(
        "How many epochs do the rule on learning curves (delta = 0.05), patience and median "
        "pruning save on 180 real runs in 40 orders, and at what regret?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
