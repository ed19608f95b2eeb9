"""An exact GP of 20,000 rows on the CPU, its kernel matrix never stored."""

from __future__ import annotations

import resource

from benchmarks.harness.spec import Quality, Value


def _evaluate(quick: bool) -> list[Value]:
    import torch
    from gpytorch.kernels import MaternKernel

    from benchmarks.kernels.exact_gp import _data
    from probkit.kernels import evaluate, partitioned
    from probkit.kernels.iterative import Iterative, NoisyKernel

    kernel = MaternKernel(nu=2.5)
    params = {"lengthscale": torch.tensor(0.5, dtype=torch.float64)}
    noise = torch.tensor(0.1, dtype=torch.float64)
    options = Iterative(tolerance=1e-6, rank=200, probes=8)

    x, y = _data(1500, "cpu")
    K = evaluate(kernel, x, params=params)
    v = torch.stack([y, y.sin()], 1)
    product = partitioned(kernel, x, params=params) @ v
    apart = float((product - K @ v).abs().max() / (K @ v).abs().max())
    K.diagonal().add_(noise)
    small = NoisyKernel(partitioned(kernel, x, params=params), noise, options).reduce(y[:, None])
    off = float((small.log_det.value - torch.logdet(K)).abs() / small.log_det.error)
    exact = torch.linalg.solve(K, y[:, None])
    solved = float((small.solution - exact).norm() / exact.norm())
    del K

    n = 3000 if quick else 20_000
    x, y = _data(n, "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF)
    big = NoisyKernel(partitioned(kernel, x, params=params), noise, options)
    found = big.reduce(y[:, None])
    after = resource.getrusage(resource.RUSAGE_SELF)
    residual = float((big.multiply(found.solution) - y[:, None]).norm() / y.norm())
    return [
        Value("1,500 rows: products, largest relative difference from dense", apart, 0.0, 1e-10),
        Value("1,500 rows: solution, relative difference from dense", solved, 0.0, 1e-4),
        Value("1,500 rows: log determinant, standard errors from dense", off, 0.0, 4.0, "at most"),
        Value(f"{n} rows: relative residual of the solve", residual, 0.0, 2e-6, "at most"),
        Value(
            f"{n} rows: peak memory of the process, MiB",
            after.ru_maxrss / 1024,
            2000.0,
            0.0,
            "at most",
            note=f"the matrix alone would take {8 * n**2 / 2**20:.0f} MiB",
        ),
        Value(
            f"{n} rows: memory added by the solve, MiB", (after.ru_maxrss - before.ru_maxrss) / 1024
        ),
        Value(f"{n} rows: CPU seconds", after.ru_utime - before.ru_utime),
        Value(f"{n} rows: standard error of the log determinant", float(found.log_det.error)),
    ]


BENCHMARK = Quality(
    title="Exact GP by iteration on the CPU",
    question="What do solve and log determinant of a kernel matrix cost that is never stored?",
    evaluate=_evaluate,
    packages=("probkit", "torch", "gpytorch"),
    timeout=3600.0,
)
