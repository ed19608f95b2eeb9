"""Extrapolation of real learning curves: density and squared error, ranked among methods.

Curves of the Learning Curve Database (sample sizes) and of MLP runs (epochs), cut at 20, 40 and 80
per cent. Every method gives a law of each later value; the density is that of the normalised
accuracy, the error that of the median, both averaged over later values. Tempered SMC samples the
same prior as the network, on fewer curves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

_SHARES = (0.2, 0.4, 0.8)
_FLOOR = 2e-3  # smallest standard deviation of the two simple methods
_SMC = {"n": 500, "moves": 9, "last_moves": 20, "runs": 1}

Score = tuple[float, float]  # mean log density, mean squared error of the median


def _normal(mean: Any, sd: Any, y: Any) -> Score:
    import numpy as np

    z = (y - mean) / sd
    density = -0.5 * z**2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    return float(density.mean()), float(((y - mean) ** 2).mean())


def _last_value(t: Any, seen: Any, later_t: Any, later: Any) -> Score:
    """A random walk from the last value, with the step size of the observed part."""
    import numpy as np

    step = np.sqrt(np.mean(np.diff(seen) ** 2)) if len(seen) > 1 else 0.1
    sd = np.maximum(step * np.sqrt(later_t - t[-1]), _FLOOR)
    return _normal(seen[-1], sd, later)


def _power_law(t: Any, seen: Any, later_t: Any, later: Any) -> Score:
    """Least squares of c - a t^-alpha, with the residual standard deviation."""
    import numpy as np
    from scipy.optimize import least_squares

    def curve(p: Any, at: Any) -> Any:
        return p[0] - p[1] * at ** -np.exp(p[2])

    fits = [
        least_squares(
            lambda p: curve(p, t) - seen,
            (seen.max(), seen.max() - seen.min() + 0.01, np.log(rate)),
            bounds=((0, -2, -4), (1, 2, 2)),
        )
        for rate in (0.3, 1.0)
    ]
    best = min(fits, key=lambda fit: fit.cost)
    spread = np.sqrt(2 * best.cost / max(1, len(seen) - 3))
    return _normal(curve(best.x, later_t), max(spread, _FLOOR), later)


def _network(lc: Any) -> Callable[..., Score]:
    def score(t: Any, seen: Any, later_t: Any, later: Any) -> Score:
        import torch

        from probkit.models.pfn import Curves

        curves = Curves(torch.from_numpy(t), torch.from_numpy(seen), allow_outside=True)
        law = lc.law(curves, torch.from_numpy(later_t)[None])
        y = torch.from_numpy(later)[None]
        error = (law.median.double() - y).square().mean()
        return float(law.log_prob(y).double().mean()), float(error)

    return score


def _sampled(t: Any, seen: Any, later_t: Any, later: Any) -> Score:
    import torch

    from probkit.models.pfn import curve_posterior, sampled_scores
    from probkit.models.pfn.curve_prior import mean_curve

    post = curve_posterior(
        torch.from_numpy(t), torch.from_numpy(seen), rng=0, dtype=torch.float32, **_SMC
    )
    at, y = torch.from_numpy(later_t).float(), torch.from_numpy(later).float()
    values = {name: value[0] for name, value in post.draws.items()}
    middle = mean_curve(values, at).median(0).values
    error = (middle - y).square().mean()
    return float(sampled_scores(post, at, y).mean()), float(error)


def _curves(count: int) -> dict[str, list[tuple[Any, Any]]]:
    """Steps and normalised accuracies of ``count`` curves of each collection."""
    import numpy as np

    from probkit.datasets import load_lcdb_curves, load_mlp_curves
    from probkit.models.pfn import CurveNormalizer

    folder = Path(os.environ["PROBKIT_DATA"]) / "pfn"
    sets = {"LCDB": load_lcdb_curves(folder), "MLP": load_mlp_curves(folder, metric="accuracy")}
    accuracy = CurveNormalizer.accuracy()
    found = {}
    for name, data in sets.items():
        order = np.random.default_rng(0).permutation(len(data))[:count]
        found[name] = [
            (data.t[i].double().numpy(), accuracy.normalize(data.y[i]).numpy()) for i in order
        ]
    return found


def _ranks(table: Any) -> Any:
    """Mean rank of each column, 1 for the smallest of a row; ties share theirs."""
    from scipy.stats import rankdata

    return rankdata(table, axis=1).mean(0)


def _evaluate(quick: bool) -> list[Value]:
    if "PROBKIT_DATA" not in os.environ:
        raise Unavailable("PROBKIT_DATA is not set: the curves are read from its pfn folder")
    import numpy as np

    from probkit.models.pfn import LearningCurvePFN

    lc = LearningCurvePFN.load(out_of_prior="ignore")
    cheap: dict[str, Callable[..., Score]] = {
        "network": _network(lc),
        "last value": _last_value,
        "power law": _power_law,
    }
    with_smc = {**cheap, "SMC": _sampled}
    plans = ((cheap, 10),) if quick else ((cheap, 180), (with_smc, 20))
    values = []
    for methods, count in plans:
        shares = _SHARES if "SMC" not in methods else (0.2, 0.8)
        for name, curves in _curves(count).items():
            for share in shares:
                cuts = [max(2, round(share * len(t))) for t, _ in curves]
                scores = np.array(
                    [
                        [score(t[:c], y[:c], t[c:], y[c:]) for score in methods.values()]
                        for (t, y), c in zip(curves, cuts, strict=True)
                    ]
                )  # [curve, method, 2]
                for kind, table in (
                    ("log density", -scores[..., 0]),
                    ("squared error", scores[..., 1]),
                ):
                    ranks = _ranks(table)
                    where = f"{name}, {count} curves, {share:.0%} seen, {kind}"
                    print(f"  {where}: {dict(zip(methods, ranks, strict=True))}", file=sys.stderr)
                    middle = np.median(table, 0)
                    values += [
                        Value(
                            f"{where}: mean rank of {method}",
                            float(rank),
                            note=f"median {-m if kind == 'log density' else m:.3g}",
                        )
                        for method, rank, m in zip(methods, ranks, middle, strict=True)
                    ]
    return values


BENCHMARK = Quality(
    title="Extrapolating real learning curves",
    question=(
        "How does the network rank in density and squared error on real curves, among the last "
        "value, power-law least squares and sampling of its own prior by tempered SMC?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "scipy"),
)
