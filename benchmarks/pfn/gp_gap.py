"""How far networks trained on a Gaussian process are from its exact predictions."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.spec import Quality, Value

_OBSERVED = (0, 1, 3, 5, 10, 20)


def _gaps(net: Any, prior: Any, sets: int) -> dict[int, tuple[float, float]]:
    """Mean of log exact - log network at new rows, with its standard error, by rows observed."""
    values, (x, y) = prior.sample_dataset(sets, rng=77)
    found = {}
    for n in _OBSERVED:
        law = net.predict_sets(x[:, :n], y[:, :n], x[:, n:])
        exact = prior.exact(values, x[:, :n], y[:, :n], x[:, n:])
        gap = exact.log_prob(y[:, n:].double()) - law.log_prob(y[:, n:]).double()
        each = gap.mean(1)
        found[n] = float(each.mean()), float(each.std()) / sets**0.5
    return found


def _evaluate(quick: bool) -> list[Value]:
    from probkit.models.pfn import GPPrior, amortize

    prior = GPPrior(rows=28, lengthscale=0.6, noise_var=1e-2)
    values = []
    for steps in (50,) if quick else (250, 1000, 4000):
        net = amortize(prior, "tiny", steps=steps, bars=150, batch=32, most=21, rng=0)
        for n, (gap, error) in _gaps(net, prior, 300 if quick else 4000).items():
            print(f"  {32 * steps} data sets, n = {n}: {gap:.4f} +- {error:.4f}", file=sys.stderr)
            last = steps == 4000
            values.append(
                Value(
                    f"{32 * steps} data sets, {n} rows observed: nats above the exact process",
                    gap,
                    reference=0.1 if last else None,
                    rule="at most",
                    note=f"standard error {error:.4f}",
                )
            )
    return values


BENCHMARK = Quality(
    title="Networks that mimic a Gaussian process",
    question=(
        "How many nats above the exact negative log-likelihood of a Gaussian process (one input, "
        "lengthscale 0.6, noise 0.01) is a network of width 64, by rows observed and data sets "
        "trained on?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
