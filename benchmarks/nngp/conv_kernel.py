"""Convolutional Gram matrices: ReLU, three convolutions, float64, one thread."""

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
_W_STD, _B_STD, _LAST_W_STD = 1.5, 0.3, 1.2


def _images(workload: Workload) -> Any:
    """Return images [n, side, side, 3] as a NumPy array, equal in every environment."""
    import numpy as np

    n, side = int(workload["n"]), int(workload["side"])
    return np.random.default_rng(0).standard_normal((n, side, side, 3))


def _entries(gram: Any) -> Fingerprint:
    """Return a few entries of a Gram matrix [n, n], and sums that reach all the others."""
    n = gram.shape[0]
    diagonal = [float(gram[i, i]) for i in (0, n // 2, n - 1)]
    beside = [float(gram[i, j]) for i, j in ((0, 1), (1, 0), (0, n - 1))]
    rows = [float(gram[i].sum()) for i in range(n)]
    return {"diagonal": diagonal, "off diagonal": beside, "row sums": rows}


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit.kernels import NNGPKernel

    x = torch.as_tensor(_images(workload)).to(device)
    kernel = NNGPKernel(
        _DEPTH,
        w_std=_W_STD,
        b_std=_B_STD,
        last_w_std=_LAST_W_STD,
        arch="conv",
        image_shape=x.shape[1:],
        pooling=str(workload["head"]),
    ).to(x)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return kernel(x).to_dense()

    return Task(run, _entries)


def _neural_tangents(workload: Workload, device: str) -> Task:
    import jax

    jax.config.update("jax_enable_x64", True)
    from neural_tangents import stax

    layers = [
        layer
        for _ in range(_DEPTH)
        for layer in (
            stax.Conv(1, (3, 3), padding="SAME", W_std=_W_STD, b_std=_B_STD),
            stax.Relu(),
        )
    ]
    head = stax.Flatten() if workload["head"] == "flatten" else stax.GlobalAvgPool()
    *_, kernel_fn = stax.serial(*layers, head, stax.Dense(1, W_std=_LAST_W_STD))
    x = jax.numpy.asarray(_images(workload))
    gram = jax.jit(lambda images: kernel_fn(images, None, "nngp"))
    return Task(lambda: gram(x).block_until_ready(), _entries)


BENCHMARK = Benchmark(
    title="Convolutional NNGP kernel, ReLU, 3 convolutions",
    question=(
        "How long does the full Gram matrix of n images take (three channels, float64, one "
        "thread; side^2 pairs of pixels for each pair of images and layer when flattening, "
        "side^4 with global average pooling), against neural-tangents (jit)?"
    ),
    workloads=(
        {"head": "flatten", "side": 16, "n": 100},
        {"head": "flatten", "side": 16, "n": 200},
        {"head": "flatten", "side": 32, "n": 100},
        {"head": "gap", "side": 8, "n": 24},
        {"head": "gap", "side": 8, "n": 48},
        {"head": "gap", "side": 16, "n": 8},
    ),
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
            agreement=Agreement(("diagonal", "off diagonal", "row sums"), rtol=1e-10),
            goal=Goal("at most 0.5 times neural-tangents' CPU time", 0.5),
        ),
    ),
    repeats=5,
    min_seconds=0.3,
)
