"""Exact GP evidence with its gradient, and predictions, without a stored kernel matrix."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import (
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)

_NOISE, _PROBES, _RANK, _STEPS = 0.1, 10, 100, 200


def _data(n: int, device: str) -> tuple[Any, Any]:
    import numpy as np
    import torch

    g = np.random.default_rng(0)
    x = g.random((n, 4))
    y = np.sin(6 * x).sum(1) + 0.3 * g.standard_normal(n)
    return torch.as_tensor(x).to(device), torch.as_tensor(y).to(device)


def _numbers(found: Any) -> Fingerprint:
    evidence, mean = found
    return {"evidence": [float(evidence)], "mean": [float(v) for v in mean[:5]]}


def _probkit(workload: Workload, device: str) -> Task:
    import torch
    from gpytorch.kernels import MaternKernel

    from probkit.kernels import partitioned, product
    from probkit.kernels.iterative import Iterative, NoisyKernel

    x, y = _data(int(workload["n"]), device)
    kernel = MaternKernel(nu=2.5).to(x)
    options = Iterative(tolerance=1e-4, rank=_RANK, probes=_PROBES, max_iter=_STEPS)

    def run() -> Any:
        params = {"lengthscale": x.new_tensor(0.5).requires_grad_()}
        noise = x.new_tensor(_NOISE).requires_grad_()
        A = NoisyKernel(partitioned(kernel, x, params=params), noise, options)
        quadratic, log_det, solution = A.reduce(y[:, None])
        evidence = -0.5 * (quadratic.sum() + log_det.value)
        torch.autograd.grad(evidence, [*params.values(), noise])
        with torch.no_grad():
            mean = product(kernel, x[:100], x, solution, params=params)
        return evidence.detach(), mean[:, 0]

    return Task(run, _numbers)


def _gpytorch(workload: Workload, device: str) -> Task:
    import gpytorch
    import torch

    x, y = _data(int(workload["n"]), device)
    kernel = gpytorch.kernels.MaternKernel(nu=2.5).to(x)
    kernel.lengthscale = 0.5
    rows = max(1, 2**30 // (8 * len(x)))  # GPyTorch's own partitions, of 1 GiB

    def run() -> Any:
        noise = x.new_tensor(_NOISE).requires_grad_()
        with (
            gpytorch.settings.max_cholesky_size(1),
            gpytorch.settings.cg_tolerance(1e-4),
            gpytorch.settings.max_cg_iterations(_STEPS),
            gpytorch.settings.num_trace_samples(_PROBES),
            gpytorch.settings.max_preconditioner_size(_RANK),
            gpytorch.settings.min_preconditioning_size(1),
            gpytorch.beta_features.checkpoint_kernel(rows),
        ):
            A = kernel(x).add_diagonal(noise)
            quadratic, log_det = A.inv_quad_logdet(y[:, None], logdet=True)
            evidence = -0.5 * (quadratic + log_det)
            evidence.backward()
            with torch.no_grad():
                mean = kernel(x[:100], x).to_dense() @ A.solve(y[:, None])
        return evidence.detach(), mean[:, 0]

    return Task(run, _numbers)


BENCHMARK = Benchmark(
    title="Exact GP evidence, gradient and predictions by iteration",
    question="How long do evidence, gradient and predictions take with 10 probe vectors?",
    workloads=({"n": 2000},),
    gpu_workloads=({"n": 20000}, {"n": 100000}),
    contenders=(
        Contender("probkit", _probkit, ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("GPyTorch", _gpytorch, ("gpytorch", "torch"), devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison(
            "probkit",
            "GPyTorch",
            "both estimate the log determinant from random vectors of their own",
            gpu_goal=Goal("at most half of GPyTorch", 0.5),
        ),
    ),
    repeats=3,
)
