"""The network beside sampled posteriors, on common curves of the prior.

The sampled scores are read from ``reference.jsonl``, which :mod:`benchmarks.pfn._reference` fills.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value


def _network_scores(lc: Any, y: Any, cut: int) -> Any:
    """Mean log density [curve] of the epochs after ``cut``."""
    import torch

    from probkit.models.pfn import Curves

    seen = Curves(None, y[:, :cut], allow_outside=True)
    law = lc.law(seen, torch.arange(cut + 1.0, 101.0).double().expand(len(y), -1))
    return law.log_prob(y[:, cut:]).double().mean(1)


def _evaluate(quick: bool) -> list[Value]:
    import numpy as np

    from benchmarks.pfn._reference import CUTS, common_curves, entries
    from probkit.models.pfn import LearningCurvePFN

    stored = entries()
    if not stored:
        raise Unavailable("run python -m benchmarks.pfn._reference first")
    lc = LearningCurvePFN.load(out_of_prior="ignore")
    y = common_curves(1 + max(one["curve"] for one in stored))
    values = []
    for cut in CUTS:
        here = sorted((e for e in stored if e["cut"] == cut), key=lambda e: e["curve"])
        rows = [e["curve"] for e in here]
        network = _network_scores(lc, y[rows], cut).numpy()
        pooled = np.array([e["pooled"] for e in here])
        runs = np.array([e["runs"] for e in here])
        better = np.maximum(runs.max(1), pooled)
        gap = network - pooled
        error = gap.std(ddof=1) / len(gap) ** 0.5
        between = np.abs(runs[:, 0] - runs[:, 1])
        print(
            f"  cut {cut}, {len(here)} curves: network {network.mean():.3f}, SMC "
            f"{pooled.mean():.3f}, gap {gap.mean():.3f} +- {error:.3f}",
            file=sys.stderr,
        )
        values += [
            Value(f"{cut} epochs seen: log density of the network", float(network.mean())),
            Value(
                f"{cut} epochs seen: log density of SMC",
                float(pooled.mean()),
                note=f"its runs pooled, the same {len(here)} curves",
            ),
            Value(
                f"{cut} epochs seen: shortfall of the network",
                float(-gap.mean()),
                reference=0.0,
                tolerance=2 * float(error),
                rule="at most",
                note="SMC minus network; the tolerance is two standard errors",
            ),
            Value(f"{cut} epochs seen: median gap", float(np.median(gap))),
            Value(
                f"{cut} epochs seen: SMC, best of the runs of each curve",
                float(better.mean()),
                note="an optimistic bound: it chooses after seeing the scores",
            ),
            Value(
                f"{cut} epochs seen: SMC, spread between runs",
                float(between.mean()),
                note=f"mean distance of two runs; median {np.median(between):.2g}",
            ),
            Value(
                f"{cut} epochs seen: SMC, processor seconds a curve",
                float(np.mean([e["seconds"] for e in here])),
            ),
        ]
    return values


BENCHMARK = Quality(
    title="Learning curves: the network beside sampling",
    question=(
        "Is the network's log density on prior curves within two standard errors of that of "
        "sampled posteriors, and how far do runs of the sampler lie apart?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
