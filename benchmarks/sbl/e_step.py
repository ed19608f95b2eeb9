"""One E-step with a Kronecker dictionary of three modes: factored beside dense.

15^3 unknowns and 12^3 data, real, float64; larger dense forms do not fit.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)


def _problem(side: int, device: str) -> tuple[list[Any], list[Any], Any, Any]:
    """Return factors, variances, noise variance and data."""
    import torch

    g = torch.Generator().manual_seed(0)
    rows = (4 * side) // 5

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device)

    factors = [normal(rows, side) for _ in range(3)]
    variances = [normal(side).abs() for _ in range(3)]
    noise = torch.tensor(0.1, dtype=torch.float64, device=device)
    return factors, variances, noise, normal(1, rows, rows, rows)


def _entries(moments: Any) -> Fingerprint:
    mean, variance = moments.mean.flatten(), moments.variance.flatten()
    places = [0, len(mean) // 3, len(mean) // 2, len(mean) - 1]
    return {
        "mean": [float(mean[k]) for k in places],
        "variance": [float(variance[k]) for k in places],
        "log evidence": [float(moments.log_evidence)],
    }


def _factored(workload: Workload, device: str) -> Task:
    from probkit.models.sbl.kronecker_e_step import kronecker_moments, kronecker_spectrum

    factors, variances, noise, y = _problem(int(workload["side"]), device)

    def run() -> Any:
        return kronecker_moments(kronecker_spectrum(factors, variances, noise), variances, y)

    return Task(run, _entries)


def _dense(workload: Workload, device: str) -> Task:
    import functools

    import torch

    from probkit.models.sbl.e_step import dense_moments
    from probkit.models.sbl.mode_products import outer

    side = int(workload["side"])
    factors, variances, noise, y = _problem(side, device)
    dictionary = functools.reduce(torch.kron, factors)

    def run() -> Any:
        return dense_moments(dictionary, outer(variances).flatten(), noise, y.flatten(1))

    return Task(run, _entries)


_OURS = ("probkit", "torch")

BENCHMARK = Benchmark(
    title="E-step with a Kronecker dictionary",
    question=(
        "How much faster is one E-step at 15^3 unknowns in factored form than in the dense form?"
    ),
    workloads=({"side": 15},),
    gpu_workloads=tuple({"side": side} for side in (60, 120)),
    contenders=(
        Contender("factored", _factored, _OURS, devices=("cpu", "cuda")),
        Contender("dense", _dense, _OURS),
    ),
    comparisons=(
        Comparison(
            ours="factored",
            peer="dense",
            agreement=Agreement(("mean", "variance", "log evidence"), rtol=1e-8, atol=1e-10),
            goal=Goal("at least 500 times faster than dense", 1 / 500),
        ),
    ),
    repeats=7,
    min_seconds=0.2,
)
