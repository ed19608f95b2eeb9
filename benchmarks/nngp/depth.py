"""The NNGP Gram matrix as networks get deeper: ReLU, 1000 rows, eight inputs, one thread."""

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

_WEIGHT_VARIANCE, _BIAS_VARIANCE = 2.0, 0.05
_N, _D = 1000, 8


def _rows() -> Any:
    """Return inputs [1000, 8] as a NumPy array, equal in every environment."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((_N, _D))


def _entries(gram: Any) -> Fingerprint:
    """Return a few entries of a Gram matrix [n, n], and sums that reach all the others."""
    beside = [float(gram[i, j]) for i, j in ((0, 0), (0, 1), (1, 0), (_N // 3, _N // 2))]
    rows = [float(gram[i].sum()) for i in range(0, _N, _N // 16)]
    return {"entries": beside, "row sums": rows}


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit.kernels import NNGPKernel

    x = torch.as_tensor(_rows()).to(device)
    w_std, b_std = _WEIGHT_VARIANCE**0.5, _BIAS_VARIANCE**0.5
    depth = int(workload["depth"])
    kernel = NNGPKernel(depth, "relu", w_std, b_std, w_std, b_std).to(x)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return kernel(x).to_dense()

    return Task(run, _entries)


def _neural_tangents(workload: Workload, device: str) -> Task:
    import jax

    jax.config.update("jax_enable_x64", True)
    from neural_tangents import stax

    w_std, b_std = _WEIGHT_VARIANCE**0.5, _BIAS_VARIANCE**0.5
    hidden = [
        layer
        for _ in range(int(workload["depth"]))
        for layer in (stax.Dense(1, W_std=w_std, b_std=b_std), stax.Relu())
    ]
    *_, kernel_fn = stax.serial(*hidden, stax.Dense(1, W_std=w_std, b_std=b_std))
    x = jax.numpy.asarray(_rows())
    gram = jax.jit(lambda rows: kernel_fn(rows, None, "nngp"))
    return Task(lambda: gram(x).block_until_ready(), _entries)


BENCHMARK = Benchmark(
    title="NNGP kernel by depth, ReLU",
    question=(
        "Does the time of the Gram matrix grow linearly with the number of hidden layers (n = "
        "1000, d = 8, float64, one thread), and how does it compare with neural-tangents (jit)?"
    ),
    workloads=tuple({"depth": depth} for depth in (1, 2, 4, 8, 16, 32)),
    contenders=(
        Contender("probkit", _probkit, ("probkit", "torch", "gpytorch"), devices=("cpu", "cuda")),
        Contender(
            "neural-tangents",
            _neural_tangents,
            ("neural-tangents", "jax", "jaxlib"),
            env="neural_tangents",
        ),
    ),
    comparisons=(
        Comparison(
            ours="probkit",
            peer="neural-tangents",
            agreement=Agreement(("entries", "row sums"), rtol=1e-10),
            goal=Goal("at most 0.5 times neural-tangents' CPU time", 0.5),
        ),
    ),
    repeats=5,
    min_seconds=0.3,
)
