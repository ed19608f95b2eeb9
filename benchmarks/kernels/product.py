"""An NNGP matrix times vectors, never stored, beside storing it in blocks of rows."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Task,
    Workload,
)

_VECTORS = 16


def _sums(out: Any) -> Fingerprint:
    return {"sums": [float(out.sum()), float(out[0].sum()), float(out[-1].sum())]}


def _right(x: Any) -> Any:
    import numpy as np
    import torch

    draws = np.random.default_rng(1).standard_normal((len(x), _VECTORS))
    return torch.as_tensor(draws).to(x)


def _by_backend(name: str) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        from benchmarks.kernels import _networks
        from probkit.kernels import backend

        x = _networks.inputs(int(workload["n"]), device)
        w, b = _networks.variances(x)
        right, functions = _right(x), backend(name, device)

        def run() -> Any:
            return functions.nngp_product(x, None, right, w, b)

        facts = lambda: _networks.achieved(run, len(x) ** 2, 8.0 * right.numel())  # noqa: E731
        return Task(run, _sums, facts=facts)

    return prepare


def _blocks(workload: Workload, device: str) -> Task:
    import torch

    from benchmarks.kernels import _networks

    x = _networks.inputs(int(workload["n"]), device)
    right = _right(x)
    rows = max(1, 2**30 // (8 * len(x)))  # a block of 1 GiB

    def run() -> Any:
        return torch.cat([_networks.eager(part, x) @ right for part in x.split(rows)])

    return Task(run, _sums)


_SAME = Agreement(("sums",), rtol=1e-6)

BENCHMARK = Benchmark(
    title="An NNGP matrix times 16 vectors",
    question="How long does a product take with a kernel matrix that is never stored?",
    workloads=({"n": 3000},),
    gpu_workloads=({"n": 20000}, {"n": 200000}),
    contenders=(
        Contender("fused", _by_backend("cupy"), ("probkit", "torch"), devices=("cuda",)),
        Contender("tiled", _by_backend("torch"), ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("eager blocks", _blocks, ("torch",), devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison("fused", "eager blocks", _SAME),
        Comparison("tiled", "eager blocks", _SAME),
    ),
    repeats=3,
)
