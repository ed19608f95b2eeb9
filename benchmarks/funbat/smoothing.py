"""Smoothing one mode: banded Cholesky factorisations against the associative scan."""

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


def _fingerprint(result: Any) -> Fingerprint:
    last = len(result.mean) - 1
    steps = (0, last // 3, last)
    return {
        "log evidence": [float(result.log_evidence)],
        "mean": [float(result.mean[t, 0]) for t in steps],
        "variance": [float(result.cov[t, 0, 0]) for t in steps],
    }


def _probkit(banded: bool) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from probkit.inference.message_passing import (
            NaturalSites,
            join_components,
            markov_prior,
            smooth_sites,
        )
        from probkit.kernels.state_space import Matern

        steps, r = int(workload["T"]), int(workload["r"])
        space = Matern(float(workload["nu"]), lengthscale=0.1).state_space()
        gaps = torch.full((steps - 1,), 1 / (steps - 1), dtype=torch.float64)
        A, Q = space.dynamics(gaps, space.log_hyper)
        P = space.stationary(space.log_hyper)
        one = markov_prior(
            P.expand(r, *P.shape),
            A.expand(r, *A.shape),
            Q.expand(r, *Q.shape),
            space.observation()[None],
        )
        prior = join_components(one)
        if not banded:
            prior = prior._replace(precision=None)
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(steps, r, 2, generator=generator, dtype=torch.float64)
        y = torch.randn(steps, 2, 1, generator=generator, dtype=torch.float64)
        sites = NaturalSites((a @ y).squeeze(-1), a @ a.mT)
        return Task(lambda: smooth_sites(prior, sites), _fingerprint)

    return prepare


BENCHMARK = Benchmark(
    title="Smoothing a mode, banded factorisation against scan",
    question=(
        "How much faster than the associative scan are two banded Cholesky factorisations for one "
        "mode of T points and r components (Matern of smoothness nu, float64, one thread)?"
    ),
    workloads=(
        {"T": 1461, "r": 2, "nu": 0.5},
        {"T": 1461, "r": 3, "nu": 1.5},
        {"T": 1461, "r": 7, "nu": 0.5},
    ),
    contenders=(
        Contender("banded", _probkit(True), ("probkit", "torch", "scipy")),
        Contender("scan", _probkit(False), ("probkit", "torch")),
    ),
    comparisons=(
        Comparison(
            ours="banded",
            peer="scan",
            agreement=Agreement(("log evidence", "mean", "variance"), rtol=1e-8, atol=1e-8),
            goal=Goal("at most 0.5 times the scan's CPU time", 0.5),
        ),
    ),
    repeats=3,
)
