"""PaRIS: cost against the number of particles, and the bias that the Parisian Gibbs removes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.spec import Quality, Value

_STEPS = 30


def _setting() -> tuple[Any, Any]:
    """Return the model a=0.7, b=1, sx=0.2, sy=1 and a simulated series y [step, 1]."""
    from probkit.models.state_space import LinearGaussian

    model = LinearGaussian(0.7, 0.04, 1.0, 1.0)
    return model, model.simulate_path(_STEPS, rng=0)[1][0]


def _products(t: int, old: Any, new: Any, data: Any) -> Any:
    """The functional: sum of x_(t-1) x_t."""
    return new[:, 0] * 0.0 if t == 0 else (old * new)[:, 0]


def _exact(model: Any, y: Any) -> float:
    """Posterior mean of the functional, from the joint Gaussian of all states."""
    import torch

    steps = torch.arange(_STEPS)
    a = float(model.transition)
    prior = float(model.initial_law[1]) * a ** (steps[:, None] - steps).abs().double()
    gain = torch.linalg.solve(prior + torch.eye(_STEPS), prior).mT
    mean, cov = gain @ y[:, 0], prior - gain @ prior
    return float((mean[:-1] * mean[1:]).sum() + cov.diagonal(1).sum())


def _cost(exact: bool, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """Transition densities looked at and CPU seconds of one run of each size."""
    from probkit import infer
    from probkit.inference.smc import PaRIS

    model, y = _setting()
    looks, seconds = [], []
    for n in sizes:
        options = PaRIS(n, _products, exact=exact)
        started = time.process_time()
        post = infer(model, y, options, rng=0)
        seconds.append(time.process_time() - started)
        looks.append(float(post.sample_stats["backward_evaluations"].sum()))
    return looks, seconds


def _slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Exponent of the growth of cost with size, between the smallest and the largest."""
    return math.log(costs[-1] / costs[0]) / math.log(sizes[-1] / sizes[0])


def _bias(chains: int) -> list[tuple[float, float]]:
    """Mean error of the estimate of each of six sweeps with ten particles, and its error."""
    import torch

    from probkit.inference.smc import parisian_sweep

    model, y = _setting()
    answer = _exact(model, y)
    g = torch.Generator().manual_seed(0)
    errors = torch.zeros(chains, 6, dtype=torch.float64)
    for chain in range(chains):
        reference = None
        for sweep in range(6):
            found = parisian_sweep(model, y, 10, _products, reference, rng=g)
            reference = found.path
            errors[chain, sweep] = found.value - answer
    mean, sd = errors.mean(0), errors.std(0) / chains**0.5
    return [(float(m), float(s)) for m, s in zip(mean, sd, strict=True)]


def _evaluate(quick: bool) -> Sequence[Value]:
    sizes = (1_000, 4_000, 16_000) if quick else (1_000, 10_000, 100_000)
    looks, seconds = _cost(False, sizes)
    few = (250, 500, 1_000, 2_000)
    _, quadratic = _cost(True, few)
    values = [
        Value(
            f"growth exponent of transition densities, accept-reject, n = {sizes[0]}..{sizes[-1]}",
            _slope(sizes, looks),
            reference=1.0,
            tolerance=0.2,
            note="linear up to logarithms",
        ),
        Value(
            f"growth exponent of CPU time, accept-reject, n = {sizes[0]}..{sizes[-1]}",
            _slope(sizes, seconds),
        ),
        Value(
            f"growth exponent of CPU time, all pairs, n = {few[0]}..{few[-1]}",
            _slope(few, quadratic),
        ),
        *(
            Value(f"CPU milliseconds a step, accept-reject, n = {n}", 1e3 * s / _STEPS)
            for n, s in zip(sizes, seconds, strict=True)
        ),
    ]
    for sweep, (bias, error) in enumerate(_bias(100 if quick else 1_200)):
        settled = sweep >= 4
        values.append(
            Value(
                f"bias of sweep {sweep + 1}, ten particles, 30 steps",
                bias,
                reference=0.0 if settled else None,
                tolerance=3 * error,
                note=f"standard error {error:.3f}" + ("; sweep 1 is plain PaRIS" * (sweep == 0)),
            )
        )
    return values


BENCHMARK = Quality(
    title="PaRIS and Parisian particle Gibbs",
    question=(
        "Is smoothing linear in the number of particles, and does repeating it around a reference "
        "path remove its bias?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)
