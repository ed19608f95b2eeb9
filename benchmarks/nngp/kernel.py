"""The NNGP Gram matrix: ReLU, three hidden layers, eight inputs, float64, one thread."""

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

_DEPTH = 3
_WEIGHT_VARIANCE, _BIAS_VARIANCE = 2.25, 0.09
_D = 8


def _rows(n: int) -> Any:
    """Return inputs [n, 8] as a NumPy array, equal in every environment."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((n, _D))


def _entries(gram: Any) -> Fingerprint:
    """Return a few entries of a Gram matrix [n, n], and sums that reach all the others."""
    n = gram.shape[0]
    diagonal = [float(gram[i, i]) for i in (0, n // 2, n - 1)]
    beside = [float(gram[i, j]) for i, j in ((0, 1), (1, 0), (0, n - 1), (n // 3, n // 2))]
    rows = [float(gram[i].sum()) for i in range(0, n, n // 16)]
    return {"diagonal": diagonal, "off diagonal": beside, "row sums": rows, "sum": [gram.sum()]}


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit.kernels import NNGPKernel

    x = torch.as_tensor(_rows(int(workload["n"]))).to(device)
    w_std, b_std = _WEIGHT_VARIANCE**0.5, _BIAS_VARIANCE**0.5
    kernel = NNGPKernel(
        depth=_DEPTH, w_std=w_std, b_std=b_std, last_w_std=w_std, last_b_std=b_std
    ).to(x)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return kernel(x).to_dense()

    return Task(run, _entries)


def _botorch(workload: Workload, device: str) -> Task:
    import torch
    from botorch.models.kernels import InfiniteWidthBNNKernel

    x = torch.as_tensor(_rows(int(workload["n"]))).to(device)
    kernel = InfiniteWidthBNNKernel(depth=_DEPTH).to(x)
    kernel.weight_var, kernel.bias_var = _WEIGHT_VARIANCE, _BIAS_VARIANCE

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
        for _ in range(_DEPTH)
        for layer in (stax.Dense(1, W_std=w_std, b_std=b_std), stax.Relu())
    ]
    *_, kernel_fn = stax.serial(*hidden, stax.Dense(1, W_std=w_std, b_std=b_std))
    x = jax.numpy.asarray(_rows(int(workload["n"])))
    gram = jax.jit(lambda rows: kernel_fn(rows, None, "nngp"))
    return Task(lambda: gram(x).block_until_ready(), _entries)


BENCHMARK = Benchmark(
    title="NNGP kernel, ReLU, 3 hidden layers",
    question=(
        "How long does the full Gram matrix take (d = 8, float64, one thread), against BoTorch's "
        "infinite-width kernel and neural-tangents (jit)?"
    ),
    workloads=({"n": 2000}, {"n": 4000}, {"n": 8000}),
    gpu_workloads=({"n": 10000}, {"n": 20000}),
    contenders=(
        Contender("probkit", _probkit, ("probkit", "torch", "gpytorch"), devices=("cpu", "cuda")),
        Contender("botorch", _botorch, ("botorch", "torch", "gpytorch"), devices=("cpu", "cuda")),
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
            peer="botorch",
            # BoTorch clamps the cosine at 1 - 1e-7, which costs its diagonal about 1e-7.
            agreement=Agreement(("diagonal", "off diagonal", "row sums", "sum"), rtol=2e-6),
            goal=Goal("at most 0.4 times BoTorch's CPU time", 0.4),
            gpu_goal=Goal("at most 0.2 times BoTorch's time", 0.2),
        ),
        Comparison(
            ours="probkit",
            peer="neural-tangents",
            agreement=Agreement(("diagonal", "off diagonal", "row sums", "sum"), rtol=1e-10),
            goal=Goal("at most 0.5 times neural-tangents' CPU time", 0.5),
        ),
    ),
    repeats=7,
    min_seconds=0.5,
)
