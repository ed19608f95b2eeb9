"""Held-out likelihood and coverage of the shipped learning-curve network."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.spec import Quality, Value

_CUTS = (10, 20, 40, 80)
# mean log density of later epochs: what a CPU run and a GPU run were asked to reach, and the
# published 128 x 3 and 512 x 12 networks after ten million curves (Adriaensen et al. 2023, table 3)
_CPU = {10: 1.52, 20: 1.90, 40: 2.17, 80: 2.32}
_GPU = {10: 1.70, 20: 2.07, 40: 2.35, 80: 2.48}
_PUBLISHED_SMALL = {10: 1.585, 20: 1.989, 40: 2.282, 80: 2.431}
_PUBLISHED_LARGE = {10: 1.758, 20: 2.133, 40: 2.403, 80: 2.519}


def _laws(lc: Any, y: Any, cut: int) -> Any:
    """The network's laws [curve, later epoch], in blocks."""
    import torch

    from probkit.models.pfn import Curves

    later = torch.arange(cut + 1, 101, dtype=torch.float64)
    for rows in torch.arange(len(y)).split(1000):
        part = Curves(None, y[rows, :cut], allow_outside=True)
        yield lc.law(part, later.expand(len(part), -1)), y[rows, cut:]


def _scores(lc: Any, y: Any, cut: int) -> dict[str, float]:
    """Mean log density with its standard error over curves, and coverage of two intervals."""
    import torch

    log_p, inside = [], {0.5: [], 0.9: []}
    for law, target in _laws(lc, y, cut):
        target = target.float()
        log_p.append(law.log_prob(target).double().mean(1))
        u = law.cdf(target)
        for level, hits in inside.items():
            hits.append(((u - 0.5).abs() <= level / 2).double().mean(1))
    scores = torch.cat(log_p)
    found = {"mean": float(scores.mean()), "error": float(scores.std()) / len(scores) ** 0.5}
    return found | {f"{level}": float(torch.cat(hits).mean()) for level, hits in inside.items()}


def _evaluate(quick: bool) -> list[Value]:
    from probkit.models.pfn import CurvePrior, LearningCurvePFN

    lc = LearningCurvePFN.load(out_of_prior="ignore")
    curves = 500 if quick else 10_000
    _, (_, y) = CurvePrior().sample_dataset(curves, rng=20_231)
    y = y.double()
    values = []
    for cut in _CUTS:
        found = _scores(lc, y, cut)
        print(f"  cut {cut}: {found}", file=sys.stderr)
        values.append(
            Value(
                f"cut {cut} %: negative log-likelihood",
                -found["mean"],
                reference=-_CPU[cut],
                rule="at most",
                note=(
                    f"standard error {found['error']:.4f}; asked of a GPU model {-_GPU[cut]}; "
                    f"published after ten million curves: 128 x 3 {-_PUBLISHED_SMALL[cut]}, "
                    f"512 x 12 {-_PUBLISHED_LARGE[cut]}"
                ),
            )
        )
        for level in ("0.5", "0.9"):
            values.append(
                Value(
                    f"cut {cut} %: coverage of the {float(level):.0%} interval",
                    found[level],
                    note="asked of a GPU model: within 0.02",
                )
            )
    return values


BENCHMARK = Quality(
    title="Learning curves: likelihood and coverage on the prior",
    question=(
        "How likely are the later epochs of 10,000 fresh curves of the prior under the shipped "
        "network, cut after 10, 20, 40 and 80 of 100 epochs, and do its intervals cover?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
