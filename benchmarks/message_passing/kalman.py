"""The Kalman smoother on one long sequence: the loop over steps against the associative scan."""

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
    """A few numbers of evidence, means [T, S] and covariances [T, S, S]."""
    last = len(result.mean) - 1
    steps = (0, last // 3, last)
    return {
        "log evidence": [float(result.log_evidence)],
        "mean": [float(result.mean[t, 0]) for t in steps],
        "variance": [float(result.cov[t, 0, 0]) for t in steps],
    }


def _probkit(method: str) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from probkit.inference.message_passing import NaturalSites, kalman_smoother

        # Two independent Matern 3/2 processes at uneven times; every third site has rank one.
        steps, states = int(workload["T"]), 4
        generator = torch.Generator().manual_seed(0)
        gaps = 0.02 * torch.rand(steps - 1, generator=generator, dtype=torch.float64) + 1e-3
        c = 3**0.5 / 0.3
        block = torch.tensor([[0.0, 1.0], [-(c**2), -2 * c]], dtype=torch.float64)
        F = torch.block_diag(block, block)
        P = torch.diag(torch.tensor([1.0, c**2, 1.0, c**2], dtype=torch.float64))
        A = torch.linalg.matrix_exp(F * gaps[:, None, None])
        Q = P - A @ P @ A.mT
        H = torch.zeros(2, states, dtype=torch.float64)
        H[0, 0] = H[1, 2] = 1.0
        root = torch.randn(steps, 2, 2, generator=generator, dtype=torch.float64)
        root[::3, :, 1] = 0.0
        noise = torch.randn(steps, 2, 1, generator=generator, dtype=torch.float64)
        sites = NaturalSites((root @ noise).squeeze(-1).to(device), (root @ root.mT).to(device))
        model = [x.to(device) for x in (torch.zeros(states, dtype=torch.float64), P, A, Q)]
        H = H.to(device)

        def run() -> Any:
            return kalman_smoother(*model, sites, observation=H, method=method)  # type: ignore[arg-type]

        return Task(run, _fingerprint)

    return prepare


_VERSIONS = ("probkit", "torch")

BENCHMARK = Benchmark(
    title="Kalman smoother, loop against scan",
    question=(
        "How much faster than the loop is the associative scan on one sequence of T steps "
        "(4 states, rank-deficient sites, uneven steps, float64, one thread)?"
    ),
    workloads=({"T": 1_000}, {"T": 10_000}, {"T": 100_000}),
    gpu_workloads=({"T": 1_000}, {"T": 10_000}, {"T": 100_000}),
    contenders=(
        Contender("scan", _probkit("scan"), _VERSIONS, devices=("cpu", "cuda")),
        Contender("loop", _probkit("loop"), _VERSIONS, devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison(
            ours="scan",
            peer="loop",
            agreement=Agreement(("log evidence", "mean", "variance"), rtol=1e-9, atol=1e-9),
            goal=Goal("at most 0.5 times the loop's CPU time", 0.5),
            gpu_goal=Goal("at most 0.1 times the loop's time", 0.1),
        ),
    ),
    repeats=3,
)
